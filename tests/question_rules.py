"""The scoring rules of the benchmarks' authors, written again from their scripts, in their steps.

VQA (GT-Vision-Lab/VQA, vqaEval.py), LLaVA (haotian-liu/LLaVA, llava/eval), MMMU
(MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py) and MME (calculation.py). Nothing here is shared
with the formats that it judges.
"""

import re

CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
        aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't
        couldn'tve=couldn't've couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't
        hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd
        hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've
        I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
        let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've
        mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock
        oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't
        shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't
        shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
        somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
        somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
        someonell=someone'll someones=someone's somethingd=something'd
        somethingd've=something'd've something'dve=something'd've somethingll=something'll
        thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're
        theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
        theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've
        weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've
        whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
        who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's
        wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've
        yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've
        y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll
        youre=you're youve=you've
    """.split()
)
NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6",
               seven="7", eight="8", nine="9", ten="10")  # fmt: skip
SIGNS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@",
         "`", ",", "?", "!"]  # fmt: skip
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


def vqa_punctuation(text: str) -> str:
    out = text
    for sign in SIGNS:
        stands_apart = (sign + " " in text) or (" " + sign in text)
        if stands_apart or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(sign, "")
        else:
            out = out.replace(sign, " ")
    return PERIOD.sub("", out, int(re.UNICODE))  # their third argument is a count


def vqa_words(text: str) -> str:
    words = []
    for word in text.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(word)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def m4c_processor(text: str) -> str:
    """LLaVA's EvalAIAnswerProcessor."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return vqa_words(vqa_punctuation(text))


def textvqa_accuracy(response: str, answers: list[str]) -> float:
    """LLaVA's TextVQAAccuracyEvaluator for one question of ten answers."""
    people = list(enumerate(map(m4c_processor, answers)))
    scores = {}
    for unique in {answer for _, answer in people}:
        parts = []
        for person in people:
            others = [other for other in people if other != person]
            parts.append(min(1, len([o for o in others if o[1] == unique]) / 3))
        scores[unique] = sum(parts) / len(parts)
    return scores.get(m4c_processor(response), 0.0)


def vqa_accuracy(response: str, answers: list[str]) -> float:
    """VQAEval.evaluate for one question; `response` is what stands in the results file."""
    people = [
        {"answer": a.replace("\n", " ").replace("\t", " ").strip(), "answer_id": n}
        for n, a in enumerate(answers, 1)
    ]
    response = response.replace("\n", " ").replace("\t", " ").strip()
    if len({person["answer"] for person in people}) > 1:
        for person in people:
            person["answer"] = vqa_words(vqa_punctuation(str(person["answer"])))
        response = vqa_words(vqa_punctuation(response))
    parts = []
    for person in people:
        others = [other for other in people if other != person]
        matching = [other for other in others if other["answer"] == response]
        parts.append(min(1, float(len(matching)) / 3))
    return float(sum(parts)) / len(parts)


def pope_meaning(text: str) -> str:
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def mme_meaning(response: str) -> str:
    response = response.strip().lower()
    if response in ("yes", "no"):
        return response
    start = response[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def scienceqa_letter(text: str) -> str:
    options = ["A", "B", "C", "D", "E"]
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    named = re.compile(r"The answer is ([A-Z]).").findall(text)
    return named[0] if len(named) == 1 else "FAILED"


def mmmu_letter(response: str, options: list[str], guess: str) -> str:
    """parse_multi_choice_response, with `guess` for its random choice."""
    letters = [chr(ord("A") + n) for n in range(len(options))]
    for sign in [",", ".", "!", "?", ";", ":", "'"]:
        response = response.strip(sign)
    response = " " + response + " "
    by_letter, in_brackets, candidates = True, False, []
    for letter in letters:
        if f"({letter})" in response:
            candidates.append(letter)
            in_brackets = True
    if not candidates:
        candidates = [letter for letter in letters if f" {letter} " in response]
    if not candidates and len(response.split()) > 5:
        for letter, option in zip(letters, options, strict=True):
            if option.lower() in response.lower():
                candidates.append(letter)
                by_letter = False
    if not candidates:
        return guess
    starts = []
    for letter in candidates:
        if by_letter:
            starts.append(response.rfind(f"({letter})" if in_brackets else f" {letter} "))
        else:
            starts.append(response.lower().rfind(options[letters.index(letter)].lower()))
    return candidates[starts.index(max(starts))]


def mmmu_normalise(text: str) -> list:
    text = text.strip()
    try:
        float(text.replace(",", ""))
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]
    return [round(float(text.replace(",", "")), 2)]


def mmmu_open_is_right(response: str, answers: list[str]) -> bool:
    """parse_open_response and eval_open."""
    response = response.strip().strip(".").lower()
    indicators = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    parts, pieces = [], re.split(r"\.\s(?=[A-Z])|\n", response)
    for index, piece in enumerate(pieces):
        if index == len(pieces) - 1:
            indicators.extend(["="])
        shortest = None
        for indicator in indicators:
            if indicator in piece:
                tail = piece.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest.strip() not in [":", ",", ".", "!", "?", ";", ":", "'"]:
            parts.append(shortest)
    parts = parts or [response]
    everything = parts.copy()
    for part in parts:
        everything += re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", part)
        everything += re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", part)
        everything += re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", part)
    predicted = {form for part in everything for form in mmmu_normalise(part)}
    right = [form for answer in answers for form in mmmu_normalise(answer)]
    for form in predicted:
        if isinstance(form, str):
            if any(isinstance(answer, str) and answer in form for answer in right):
                return True
        elif form in right:
            return True
    return False


def mmvet_scores(grades: dict[str, float], data: dict[str, dict]) -> dict[str, float]:
    """export_result: the mean grade for each capability and in total, in %."""
    sums: dict[str, float] = {"total": 0.0}
    counts: dict[str, int] = {"total": 0}
    for name, grade in grades.items():
        for ability in [*set(data[name]["capability"]), "total"]:
            sums[ability] = sums.get(ability, 0.0) + grade
            counts[ability] = counts.get(ability, 0) + 1
    return {ability: sums[ability] / counts[ability] * 100 for ability in sums}

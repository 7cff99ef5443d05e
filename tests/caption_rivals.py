"""CIDEr-D and ROUGE-L written again from the papers and the authors' parameters, for tests.

Shapes: I images, G different n-grams of one n.
"""

import math

import numpy as np


def cider(responses: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of a response to each image, by dense vectors over all n-grams of a length."""
    scores = np.zeros(len(responses))
    for n in (1, 2, 3, 4):
        texts = [*responses, *(caption for several in references for caption in several)]
        known = sorted({gram for text in texts for gram in grams(text, n)})
        occurs_IG = np.array(
            [
                [any(g in grams(text, n) for text in several) for g in known]
                for several in references
            ]
        ).reshape(len(references), len(known))
        idf_G = np.log(len(references)) - np.log(np.maximum(1, occurs_IG.sum(axis=0)))

        def vector(text: list[str], n=n, known=known, idf_G=idf_G) -> np.ndarray:
            return np.array([grams(text, n).count(g) for g in known], float) * idf_G

        for image, (response, several) in enumerate(zip(responses, references, strict=True)):
            r_G = vector(response)
            for caption in several:
                c_G = vector(caption)
                norms = np.linalg.norm(r_G) * np.linalg.norm(c_G)
                cosine = np.minimum(r_G, c_G) @ c_G / norms if norms else 0.0
                # The authors count pairs of words; 36 is 6 squared.
                gap = len(grams(response, 2)) - len(grams(caption, 2))
                scores[image] += 10 / 4 / len(several) * cosine * math.exp(-(gap**2) / 72)
    return scores.tolist()


def grams(text: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def rouge_l(response: list[str], references: list[list[str]]) -> float:
    """By all subsequences of a response, so for short ones only."""
    subsequences = {()}
    for word in response:
        subsequences |= {(*s, word) for s in subsequences}
    lengths = [max(len(s) for s in subsequences if is_inside(s, text)) for text in references]
    if not any(lengths):
        return 0.0
    precision = max(lengths) / len(response)
    recall = max(n / len(text) for n, text in zip(lengths, references, strict=True) if text)
    return 2.44 * precision * recall / (recall + 1.44 * precision)


def is_inside(part: tuple[str, ...], text: list[str]) -> bool:
    words = iter(text)
    return all(word in words for word in part)

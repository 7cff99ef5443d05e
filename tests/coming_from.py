"""What docs/coming-from.md says: its rows, its commands, and what six systems offer.

THEIRS is what the READMEs and the command lines of the six repositories name, read in the commits
that stand on the page.
"""

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
OUR_COMMANDS = ("mlx-vlm-prune ", "python -m ")
TRAINER = """
    --save_dir --save_weight --epochs --batch_size --learning_rate --device --dtype --num_workers
    --accumulation_steps --grad_clip --log_interval --save_interval --hidden_size
    --num_hidden_layers --max_seq_len --use_moe --data_path --from_weight --from_resume
    --freeze_llm --use_compile --use_wandb --wandb_project
"""
THEIRS = {
    "EfficientVLM": f"""
        train_pretrain_vlm.py train_sft_vlm.py eval_vlm.py benchmark_pruning.py dashboard
        requirements.txt --keep_ratio --pruning_strategy --ratios --strategies --weight {TRAINER}
        attention_pool score_prune
    """,
    "fastvlm-token-pruning and FastVLM": """
        get_models.sh predict.py inspect_attention.py eval_ttft.py eval_ats.py
        eval_pruning_methods.py eval_coco_benchmark.py visualize_pruning_results.py
        export_vision_encoder.py fastvlm_mlx-vlm.patch mlx_vlm.convert mlx_vlm.generate
        --model-path --model-base --image-file --prompt --conv-mode --temperature --top_p
        --num_beams --max_new_tokens --top_k_tokens --retention-ratios --num-runs --output-file
        --layer-index --top-k --print-mask --warmup-runs --report-json --results-file
        --output-dir --no-show --coco-json --image-dir --max-images --only-llm
        run_inference norm_based_pruning similarity_based_pruning attention_based_pruning
        compute_summary_statistics print_results_table print_output_comparison
    """,
    "Vision-Token-Pruning": """
        clip_pruning.ipynb mrss_proxy_experiment.ipynb get_patch_tokens clip_zeroshot_logits
        prune_tokens_l2 encode_image_pruned clip_image_features_pruned make_synthetic_batch
        benchmark_vision_latency predict_and_score ScanProxy RecurProxy Baseline MRSS flops_mrss
        measure Qwen2.5-VL latency throughput CosSim
    """,
    "LightVLM": """
        LightVLM.from_pretrained model.eval model.chat scripts/train.py phi2_clip_k144.yaml
        llava_instruct_150k.json PositionalTokenPruner LoRA SigLIP INT8 dynamic prefill
    """,
    "TwigVLM": """
        train_twig.sh twig_K twig_T gqa.sh mme.sh mmbench.sh sqa.sh textvqa.sh pope.sh vqav2.sh
        mmvet.sh -R RelAcc cli_demo.py --base-model --twig-block --twig-K --twig-T --stream
        --image-file --retained_tokens --question-file --image-folder --answers-file --num-chunks
        --chunk-idx --temperature --conv-mode --model-path --twig convert_gqa_for_eval.py
    """,
    "MiniMind-V": """
        eval_vlm.py web_demo_vlm.py train_sft_vlm.py train_pretrain_vlm.py --from_resume torchrun
        deepspeed lm_dataset.py convert_vlm.py --load_from --weight --save_dir --hidden_size
        --num_hidden_layers --use_moe --max_new_tokens --temperature --top_p --image_dir
        --show_speed --device --open_thinking --vision_model --max_seq_len --freeze_llm
    """,
}


def section(title: str) -> str:
    """The text below a heading, up to the next."""
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[tuple[str, str]]:
    """The cells of its tables, theirs and ours, without headings."""
    cells = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)
    return [pair for pair in cells if pair not in (("theirs", "here"), ("what", "name"))]


def spans(text: str) -> list[str]:
    """Its code between backticks."""
    return re.findall(r"`([^`]+)`", text)


def commands(text: str = TEXT) -> list[list[str]]:
    """Our command lines in it, in order: of blocks, and of the right columns; conversions first."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    lines += [span for _, ours in rows(text) for span in spans(ours)]
    return [shlex.split(line) for line in lines if line.startswith(OUR_COMMANDS)]

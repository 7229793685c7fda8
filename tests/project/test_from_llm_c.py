"""doc/from_llm_c.md, the map from llm.c to llmc, is whole: each of llm.c's files, flags and names is in it, and leads somewhere.

What llm.c has is listed here, as of its commit f1e2ace. Whether the links of the other side are right: tests/project/test_docs.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmc.training.settings import SETTINGS, TrainConfig, defaults

ROOT = Path(__file__).parents[2]

# Folder (of the name before the colon) and files, without README.md in it.
FILES = """
: README.md LICENSE .gitignore Makefile requirements.txt profile_gpt2.cu profile_gpt2cu.py test_gpt2.c test_gpt2.cu test_gpt2_fp32.cu
: train_gpt2.c train_gpt2.cu train_gpt2.py train_gpt2_fp32.cu train_llama3.py
.github/workflows/: ci.yml ci_gpu.yml ci_tests.yml
dev/: download_starter_pack.sh loss_checker_ci.py unistd.h vislog.ipynb
dev/cpu/: matmul_forward.c
dev/cuda/: Makefile README.md adamw.cu attention_backward.cu attention_forward.cu benchmark_on_modal.py classifier_fused.cu common.h
dev/cuda/: crossentropy_forward.cu crossentropy_softmax_backward.cu encoder_backward.cu encoder_forward.cu fused_residual_forward.cu
dev/cuda/: gelu_backward.cu gelu_forward.cu global_norm.cu layernorm_backward.cu layernorm_forward.cu matmul_backward.cu
dev/cuda/: matmul_backward_bias.cu matmul_forward.cu nccl_all_reduce.cu permute.cu residual_forward.cu softmax_forward.cu trimat_forward.cu
dev/data/: README.md data_common.py edu_fineweb.sh fineweb.py fineweb.sh hellaswag.py mmlu.py tinyshakespeare.py tinystories.py
dev/eval/: README.md export_hf.py run_eval.sh summarize_eval.py
dev/test/: Makefile device_file_io.cu test_dataloader.c test_outlier_detector.c
doc/layernorm/: layernorm.c layernorm.md layernorm.py
llmc/: adamw.cuh attention.cuh cublas_common.h cuda_common.h cuda_utils.cuh cudnn_att.cpp cudnn_att.h dataloader.h encoder.cuh
llmc/: fused_classifier.cuh gelu.cuh global_norm.cuh layernorm.cuh logger.h matmul.cuh mfu.h outlier_detector.h rand.h sampler.h
llmc/: schedulers.h tokenizer.h utils.h zero.cuh
scripts/: README.md pyrun_gpt2_124M.sh run_gpt2_124M.sh run_gpt2_1558M.sh run_gpt2_350M.sh run_gpt2_774M.sh run_gpt3_125M.sh
scripts/multi_node/: run_gpt2_124M_fs.sbatch run_gpt2_124M_mpi.sh run_gpt2_124M_tcp.sbatch
"""
FLAGS = "i j e o lg n nk nm y b t d x k l u q c sl sg v m s g h a f w ge z r pn pr pg pi ps pf"  # what main() of train_gpt2.cu reads
MAKEFILE = """
train_gpt2 test_gpt2 train_gpt2cu test_gpt2cu train_gpt2fp32cu test_gpt2fp32cu profile_gpt2cu USE_CUDNN CUDNN_FRONTEND_PATH PRECISION
NO_OMP NO_MULTI_GPU NO_USE_MPI OPENMPI_DIR GPU_COMPUTE_CAPABILITY FORCE_NVCC_O CC CI WIN_CI_BUILD
"""
TRAIN_GPT2_PY = """
input_bin input_val_bin output_dir model batch_size sequence_length total_batch_size num_iterations inference_only learning_rate
warmup_iters learning_rate_decay_frac weight_decay grad_clip val_loss_every val_max_steps sample_every overfit_single_batch tensorcores
device compile flash dtype zero_stage write_tensors
"""
BUFFERS = """
inputs targets encoded ln1 ln1_mean ln1_rstd qkv qkvr atty preatt att attproj residual2 ln2 ln2_mean ln2_rstd fch fch_gelu fcproj
residual3 lnf lnf_mean lnf_rstd logits probs losses output scratch_bt4c scratch_btc grads_acts params_memory grads_memory m_memory
v_memory master_weights acts_memory grads_acts_memory mean_loss accumulated_mean_loss cpu_losses rng_state rng_state_last_update
workload_indices bucket_info
"""
STRUCTS = """
GPT2Config ParameterTensors ActivationTensors GPT2 TensorSpec ShardInfo MultiGpuConfig DataLoader EvalLoader Tokenizer Logger
LearningRateScheduler OutlierDetector mt19937_state Packed128 SoftmaxParams GPUUtilInfo PerfData GPUEntry NvtxRange DType
"""
FUNCTIONS = """
encoder_forward encoder_backward layernorm_forward layernorm_backward matmul_forward matmul_forward_naive matmul_backward
attention_forward attention_backward gelu_forward gelu_backward residual_forward residual_backward softmax_forward crossentropy_forward
crossentropy_softmax_backward fill_in_parameter_sizes malloc_and_point_parameters fill_in_activation_sizes malloc_and_point_activations
gpt2_build_from_checkpoint gpt2_forward gpt2_zero_grad gpt2_backward gpt2_update gpt2_free random_u32 random_f32 sample_mult main
gpt2_init_common gpt2_allocate_weights gpt2_allocate_state gpt2_write_to_checkpoint gpt2_set_hyperparameters gpt3_set_hyperparameters
gpt_build_from_descriptor gpt2_validate gpt2_backward_and_reduce gpt2_get_tensor_at_layer gpt2_calculate_grad_norm gpt2_estimate_mfu
common_start common_free save_state load_state write_checkpoint delete_checkpoint error_usage adamw_update init_from_master
attention_forward_cudnn attention_backward_cudnn matmul_forward_cublaslt matmul_cublaslt fused_classifier gelu_backward_inplace
global_norm_squared global_sum_deterministic fused_residual_forward5 dataloader_init dataloader_next_batch dataloader_reset
dataloader_resume evalloader_init evalloader_reset evalloader_next_batch evalloader_stat_losses tokenizer_init tokenizer_decode
safe_printf logger_init logger_log_train logger_log_val logger_log_eval lr_scheduler_init get_learning_rate init_detector update_detector
get_flops_promised get_gpu_utilization_info manual_seed randint32 randfloat32 normal_ random_permutation sample_softmax find_max_step
multi_gpu_config_init multi_gpu_get_shard_offset multi_gpu_async_reduce_gradient set_zero_configs multi_gpu_cpu_float_sum
multi_gpu_barrier get_nccl_id_via_tcp get_nccl_id_via_fs stochastic_rounding SquirrelNoise5 device_to_file file_to_device load128 store128
blockReduce
"""


def rows(heading: str) -> list[list[str]]:
    """Return the rows of the tables below a heading, up to the next one of its level or above."""
    text = (ROOT / "doc" / "from_llm_c.md").read_text(encoding="utf-8")
    level = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert level is not None, heading
    section = re.split(rf"^#{{1,{len(level[1])}}} ", text[level.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in section.splitlines() if line.startswith("| ")]
    return [row for row in cells if row[0] != "llm.c"]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def of_llm_c(heading: str) -> set[str]:
    found = [name for row in rows(heading) for name in code(row[0])]
    assert found
    return set(found)


@pytest.mark.parametrize("heading", ["Files", "Buffers", "Structs", "Functions", "Flags", "Makefile", "train_gpt2.py"])
def test_every_row_leads_somewhere(heading: str) -> None:
    for row in rows(heading):
        assert code(row[0]), row
        assert len(row) == 3, f"a | within a cell: {row}"
        assert re.search(r"\]\([^)]+\)|`", row[1]) or row[1] == "none", row


def test_files() -> None:
    lines = [line.partition(":") for line in FILES.split("\n") if line]
    assert of_llm_c("Files") == {folder + name for folder, _, names in lines for name in names.split()}


def test_flags() -> None:
    flags = {
        code(llm_c)[0]: code(llmc)[0]
        for llm_c, llmc, _ in rows("Flags")
        if llm_c.startswith("`-") and "--" not in llm_c
    }
    assert flags.keys() == {f"-{flag}" for flag in FLAGS.split()}
    assert flags == {
        s.flag: "--" + name.replace("_", "-") for name, s in SETTINGS.items() if s.flag and s.flag != "-p"
    }  # ours


def test_defaults_are_llm_c_s() -> None:
    """With a model named, what the flags mean if they are not given; what differs the map says."""
    ours = {**TrainConfig(model="d12").to_dict(), **defaults("d12")}
    llm_c = {"batch_size": 4, "seq_len": 1024, "total_batch_size": -1, "max_steps": -1, "learning_rate": 3e-4, "schedule": "cosine",
             "warmup_steps": 0, "final_lr_frac": 1.0, "weight_decay": 0.0, "skip_loss_z": 0.0, "skip_grad_z": 0.0, "val_every": 20,
             "val_steps": 20, "sample_every": 20, "sample_tokens": 64, "hellaswag": False, "overfit": False, "tf32": True,
             "master_weights": True, "gpu_info_every": -1, "keep_checkpoints": 0, "major_every": 0, "resume": False, "processes": 1,
             "rank": 0, "gpus_per_node": 8, "checkpoint_every": 0}  # fmt: skip
    assert {name: ours[name] for name in llm_c} == llm_c


def test_makefile() -> None:
    assert of_llm_c("Makefile") == set(MAKEFILE.split())


def test_flags_of_train_gpt2_py() -> None:
    assert of_llm_c("train_gpt2.py") == {f"--{name}" for name in TRAIN_GPT2_PY.split()}
    source = (ROOT / "src" / "llmc" / "reference" / "__main__.py").read_text(encoding="utf-8")
    for llm_c, llmc, _ in rows("train_gpt2.py"):
        assert f'"{code(llm_c)[0]}"' in source
        assert llmc == "none" or code(llmc)[0][2:].replace("-", "_") in SETTINGS, llmc


@pytest.mark.parametrize("heading, names", [("Buffers", BUFFERS), ("Structs", STRUCTS), ("Functions", FUNCTIONS)])
def test_names(heading: str, names: str) -> None:
    assert set(names.split()) <= of_llm_c(heading), sorted(set(names.split()) - of_llm_c(heading))

"""What once made a watched run another one, stopped it or hung it: each kind alone, by name."""

from __future__ import annotations

import pytest

from fuzz.base import Case
from fuzz.checks import check
from fuzz.features import FEATURES

OTHER_RUNS = {
    "parameters moved by the step": (
        "byol_teacher dino_centre moco_queue mean_teacher_state_dict teacher_after_the_loss weight_clamping "
        "weight_clamping_through_data normalised_prototypes embedding_with_maximal_norm averaged_model"
    ),
    "the Trainer and what it holds": (
        "own_scheduler groups_changed_by_the_step should_stop trainer_attribute other_callback_from_the_step "
        "dataset_on_the_module dataset_through_the_trainer dataset_through_the_trainer_all "
        "forward_hooks_of_a_callback hooks_with_numbers"
    ),
    "the data pipeline": (
        "dataset_numpy_generator dataset_python_random dataset_torch_generator dataset_random_state dataset_transform "
        "concat_dataset dataset_cache dataset_counter dataset_open_file collate_numpy_generator collate_python_random "
        "sampler_numpy_generator sampler_python_random sampler_torch_generator batch_sampler_numpy_generator "
        "batch_sampler_python_random batch_sampler_torch_generator datamodule_after_transfer worker_with_seed "
        "persistent_workers datamodule"
    ),
    "state of the module": (
        "checkpoint_around_batch_norm_in_train_mode tensor_hook_in_forward numpy_random_state simple_namespace "
        "slots_object deque_subclass queue_attribute array_attribute list_iterator auxiliary_loader sparse_tensor "
        "tensor_through_data tensor_through_numpy modules_in_a_list teacher_in_a_list teacher_in_a_list_all "
        "shared_submodule_rebuilt"
    ),
}
KILLED = (
    "endless_sampler endless_sampler_without_length hugging_face_gpt2 dict_that_refuses_clear csv_logger "
    "tensorboard_logger experiment_of_the_logger batch_norm_all_in_train_mode sparse_embedding_all "
    "frozen_bf16_backbone requires_grad_toggled scripted_layer traced_layer scripted_attributes "
    "sampler_of_strings sampler_of_tuples sampler_of_tensors get_items_only adafactor_without_rate "
    "val_split_every_2_epochs"
)
UNDER_SAM = (
    "own_scheduler groups_changed_by_the_step should_stop trainer_attribute other_callback_from_the_step byol_teacher "
    "weight_clamping averaged_model hugging_face_gpt2 csv_logger experiment_of_the_logger scripted_attributes "
    "hooks_with_numbers resume_from_step"
)


@pytest.mark.parametrize("name", " ".join((*OTHER_RUNS.values(), KILLED)).split())
def test_watched_run_is_the_same(name):
    assert not check("monitor", Case((FEATURES[name],)))


@pytest.mark.parametrize("name", UNDER_SAM.split())
def test_second_pass_leaves_no_trace(name):
    assert not check("sam", Case((FEATURES[name],)))

"""Every key, once: what it means, its unit and where a default comes from. The other files only override.

Allowed values and ranges are in `dgkd_jax/config.py`; a misspelt key, a wrong type or a value out of range is an error.
Override any key on the command line: `--config.dgkd.epsilon=0.3 --config.optimizer.learning_rate=0.1`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.name = "unnamed"  # the run's work directory is runs/NAME/METHOD-seedSEED unless --workdir is given
    config.method = "dgkd"  # ce | kd | dkd | dgkd | logit_mse, or all: each in turn, then one table
    config.seed = 0  # student's initial weights, order of the data and augmentation

    # -- what is trained on what -------------------------------------------------------------------------------------
    config.student = ConfigDict()
    config.student.model = ""  # a name of dgkd_jax.models.NAMES
    config.student.dtype = "auto"  # compute dtype: float32 | bfloat16 | float64; auto = bfloat16 on TPU and GPU

    config.teacher = ConfigDict()
    config.teacher.model = ""  # a name of dgkd_jax.models.NAMES
    config.teacher.dtype = "auto"  # as student.dtype
    config.teacher.weights = ""  # .pth, .safetensors, .npz or hf:ORG/NAME; '' = train the teacher in teacher.workdir
    config.teacher.workdir = ""  # '' = runs/NAME/teacher; a trained teacher found here is reused
    config.teacher.cache = ""  # folder of its logits, from python -m dgkd_jax.cache_teacher; '' = the teacher is run
    config.teacher.mean = ()  # of the pixels that the teacher's weights were trained on, as data.mean; () = data.mean
    config.teacher.std = ()  # likewise; for whose weights they are not ImageNet's: configs/photographs.py
    config.teacher.epochs = 240  # length of the teacher's own training (cross-entropy, this file's optimizer)
    config.teacher.learning_rate = 0.05  # peak rate of the teacher's own training
    config.teacher.seed = 0  # of the teacher's own training; separate, so that students of several seeds share it

    config.data = ConfigDict()
    config.data.name = ""  # a name of dgkd_jax/data/datasets.py
    config.data.dir = ""  # TFDS data directory; '' = $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.manual_dir = ""  # files that cannot be downloaded: ImageNet's tars, an image folder, IDX files
    config.data.download = True  # may TFDS download a set that is missing
    config.data.image_size = 0  # side of the images that the models see, pixels; 0 = the data set's own
    config.data.augment = "none"  # none | pad_crop | pad_crop_flip | random_resized_crop | random_resized_crop_fast
    # …_fast: the same windows with a coarser JPEG decoder and no antialiasing; docs/performance.md, section Data
    config.data.eval_resize = 0  # shorter side before the centre crop at evaluation, pixels; 0 = no resizing
    config.data.eval_interpolation = "bilinear"  # of eval_resize, antialiased as PIL's: bilinear | bicubic
    config.data.mean = ()  # per channel, in units of pixel/255; () = the data set's own
    config.data.std = ()  # likewise
    config.data.shuffle_buffer = 0  # records in each reader's shuffle buffer; 0 = all of its piece
    config.data.readers = 1  # pieces that a split is read in; with P processes each reads readers/P of them
    config.data.train_examples = 0  # use only the first so many training images; 0 = all; generated ones: see mock_*
    config.data.label_noise = 0.0  # part of the training labels replaced by another class, for good
    config.data.max_bad_images = 0  # training images that cannot be decoded and are replaced by their neighbours
    config.data.on_device_mib = 2048  # a decoded training set up to this size is kept on each device; 0 = none is
    config.data.mock = False  # generated images of the right shapes (and random teacher weights where none are there)
    config.data.mock_train_examples = 1024  # generated images in an epoch
    config.data.mock_eval_examples = 256  # generated images in an evaluation

    # -- how long, and with what optimizer (defaults: CIFAR-100 recipe of RepDistiller and mdistiller) ---------------
    config.epochs = 240  # passes over the training split
    config.batch_size = 64  # global, over all devices
    config.eval_batch_size = 256  # global, rounded up to a multiple of the devices; does not change any result

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # sgd (PyTorch's update rule) | adamw
    config.optimizer.learning_rate = 0.05  # peak
    config.optimizer.momentum = 0.9  # sgd only
    config.optimizer.nesterov = False  # sgd only
    config.optimizer.weight_decay = 5e-4  # sgd: added to the gradient (L2); adamw: decoupled
    config.optimizer.decay_on = "all"  # all parameters, as PyTorch does | kernels: not biases and BatchNorm
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0 = no clipping
    config.optimizer.ema_decay = 0.0  # per step, of an average of the variables that is evaluated instead; 0 = none

    config.schedule = ConfigDict()
    config.schedule.name = "step"  # step | cosine | constant
    config.schedule.milestones = (150, 180, 210)  # step: epochs after which the rate is multiplied by factor
    config.schedule.factor = 0.1  # step
    config.schedule.warmup_epochs = 0.0  # linear ramp of the learning rate from 0

    config.batch_norm_groups = 1  # batch statistics over the global batch; N = over N groups, as N PyTorch GPUs do

    # -- the methods: each reads its own section ---------------------------------------------------------------------
    config.label_smoothing = 0.0  # in the cross-entropy of every method

    config.kd = ConfigDict()  # ce_weight·CE + weight·KD;  0.1, 0.9, 4: RepDistiller and mdistiller
    config.kd.ce_weight = 0.1  # of the cross-entropy
    config.kd.weight = 0.9  # of T²·KL
    config.kd.temperature = 4.0  # T

    config.logit_mse = ConfigDict()  # ce_weight·CE + weight·mean_j (z_j − v_j)²
    config.logit_mse.ce_weight = 0.1  # of the cross-entropy
    config.logit_mse.weight = 0.9  # of the squared error

    config.dkd = ConfigDict()  # ce_weight·CE + ramp·(alpha·TCKD + beta·NCKD); DGKD reads this section too
    config.dkd.ce_weight = 1.0  # of the cross-entropy
    config.dkd.alpha = 1.0  # mdistiller
    config.dkd.beta = 8.0  # mdistiller; differs from pair to pair, see configs/cifar100.py
    config.dkd.temperature = 4.0  # T
    config.dkd.warmup_epochs = 20.0  # ramp = min(epoch/warmup_epochs, 1)
    config.dkd.warmup_form = "step"  # epochs in fractions | epoch_from_0 (DGKD repository) | epoch_from_1 (mdistiller)

    config.dgkd = ConfigDict()  # … − ramp·epsilon·G, G the coupling of the gradients of TCKD and NCKD
    config.dgkd.epsilon = 0.1  # > 0 pushes the gradients apart, < 0 aligns them
    config.dgkd.epsilon_end = 0.0  # value at the end of training where epsilon_schedule is not constant
    config.dgkd.epsilon_schedule = "constant"  # constant | linear | cosine
    config.dgkd.convention = "per_sample"  # per_sample (blog) | literal, normalized (PyTorch code) | self_normalized
    config.dgkd.distance = "mse"  # mse | cosine | kl | wasserstein
    config.dgkd.wrt = "logits"  # gradients with respect to the student's logits | params: to its parameters
    config.dgkd.parity_batch = 0  # batch size in `literal` and `normalized`; 0 = batch_size
    config.dgkd.kappa = 1e-8  # guard κ of `self_normalized`

    # -- the machine, logs and checkpoints: none of these changes a result -------------------------------------------
    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which large parameters are sharded; the rest of the devices is data-parallel
    config.matmul_precision = "default"  # default | high | highest: highest = full float32 products on TPU and GPU
    config.join_timeout_s = 300  # seconds that processes wait for each other at the start
    config.heartbeat_timeout_s = 100  # seconds after which a process that is silent counts as lost, and the rest end
    config.compilation_cache = "~/.cache/dgkd_jax"  # compiled programs, kept between runs; '' = none
    config.log_every = 50  # steps between fetches of the metrics
    config.eval_every = 1.0  # epochs between evaluations; the last step is always evaluated
    config.diagnose = True  # evaluate calibration, neural collapse, distance to the teacher; keeps the split's features
    config.checkpoint_every = 0  # steps between checkpoints besides those at each evaluation; 0 = no others
    config.keep_checkpoints = 2  # newest ones kept, besides the best
    config.best_metric = "accuracy"  # which evaluation is the best: of the highest accuracy | of the lowest ce
    config.nonfinite_limit = 10  # steps in a row with a loss or gradient that is not finite (skipped) that end the run
    config.steps_per_call = 1  # of a set on the device; more where dispatching takes longer than a step, never on CPUs
    config.watchdog_s = 1800.0  # seconds without a finished step after which the process ends itself; 0 = never

    return config

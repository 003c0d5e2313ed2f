# make demo   sets everything up and makes videos in a real ComfyUI server, from text and from a
#             picture, with the toy that was trained for it, and reads what they show;
#             PICTURE=file.webp keeps them as one animated picture. Real checkpoints make real videos:
#             CHECKPOINT=/path/model.pth from text,
#             HIGH=/path/high.pth LOW=/path/low.pth IMAGE=/path/picture.png from a picture;
#             the Wan VAE and the umT5 text encoder are then taken from the ComfyUI's models folder
# make test   sets everything up and runs all tests, several at a time where there is no GPU;
#             ARGS="-k name" selects some, ARGS=-n0 runs them in one process, ARGS="-m slow" runs what
#             else is left out. The pages are tried in Chromium, which the system's package manager
#             installs where it may; without it tests/ui is skipped
#
# COMFYUI_DIR=/path/ComfyUI picks the ComfyUI to run in, COMFYUI_PACKAGES="comfy-kitchen==0.2.40"
# other versions of its packages, DYNAMIC_VRAM=1 a newer one's dynamic VRAM (without a GPU a
# simulated one), PYTHON=/path/python the Python whose torch is kept.
# Without make: python tests/prepare.py tests/demo.py
#               python tests/prepare.py -m pytest -c tests/pytest.ini -n auto --dist loadfile tests

PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)

.PHONY: demo test

demo:
	$(PYTHON) tests/prepare.py tests/demo.py $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
		$(if $(HIGH),--high "$(HIGH)") $(if $(LOW),--low "$(LOW)") $(if $(IMAGE),--image "$(IMAGE)") \
		$(if $(PICTURE),--picture "$(PICTURE)")

test:
	$(PYTHON) tests/prepare.py -m pytest -c tests/pytest.ini -n auto --dist loadfile \
		--no-loadscope-reorder -m "not slow" tests $(ARGS)

# Every target sets up what it needs by itself, in .venv. `make help` lists the targets.
# No make? `sh tools/setup.sh`, then the commands below with .venv/bin in front.
PY := .venv/bin/python
STAMP := .venv/.installed
NB ?= nbs/*.ipynb
TIER ?= cpu
ARGS ?=

unexport PYTHONDONTWRITEBYTECODE
# threads that wait sleep soon: README, "Samples without training"
export GOMP_SPINCOUNT ?= 3000
.DEFAULT_GOAL := help
NAME ?= mnist
.PHONY: help setup demo test lab export outputs weights bench site student mutants clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

$(STAMP): settings.ini setup.py pyproject.toml tools/setup.sh
	@sh tools/setup.sh

setup: $(STAMP) ## make .venv and install everything (PYTHON=python3.12 chooses the interpreter)

demo: $(STAMP) ## train on handwritten digits, write runs/demo/samples.png (5 minutes on two CPU cores)
	$(PY) -m ddpm_course.cli demo $(ARGS)

test: $(STAMP) ## export in step, notebooks clean, ruff, all notebooks, pytest (ARGS="lessons pytest" runs some stages)
	$(PY) tools/check.py $(ARGS)

lab: $(STAMP) ## open the table of contents in JupyterLab
	PATH="$(CURDIR)/.venv/bin:$$PATH" JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab nbs/index.ipynb $(ARGS)

export: $(STAMP) ## write ddpm_course/ from the notebooks and clean the notebooks
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean

outputs: $(STAMP) ## run lessons to the end and store their outputs (NB="nbs/02_forward.ipynb" TIER=cpu)
	DDPM_COURSE_TIER=$(TIER) $(PY) tools/outputs.py $(ARGS) $(NB)

weights: $(STAMP) ## train a model that ships with the package anew (NAME=mnist, or "digits shapes"; classifier-mnist is its judge)
	$(PY) tools/weights.py $(NAME)

bench: $(STAMP) ## measure speed and quality beside other projects: hours (ARGS=--quick shows in minutes that it runs)
	@$(PY) -c "import denoising_diffusion_pytorch, diffusers" 2>/dev/null || $(PY) -m pip install --quiet -e '.[bench]'
	@for run in start_up.py memory.py train_step.py samplers.py networks.py "time_to_quality.py --until-quality" "families.py --steps 1000"; do \
	  echo "== $$run"; $(PY) benchmarks/$$run $(ARGS) || exit 1; done
	@case "$(ARGS)" in *--quick*|*--out*) ;; *) $(PY) benchmarks/tables.py && echo "results in benchmarks/results, tables in README.md";; esac

site: $(STAMP) ## write the website to _site (open _site/index.html, no server needed)
	$(PY) site/prepare.py _site/.source && $(PY) -m sphinx -q -W -b html -c site _site/.source _site && echo "_site/index.html"

student: $(STAMP) ## write the lessons with blanks instead of solutions to _student (open one in JupyterLab)
	$(PY) tools/student.py _student $(ARGS)

mutants: $(STAMP) ## put known mistakes back one by one and see a test fail
	$(PY) tools/mutants.py $(ARGS)

clean: ## remove build products and caches (runs/ stays: it is your work)
	rm -rf build dist _proc _docs _site _student .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -path ./.git -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-colab too
	rm -rf .venv .venv-colab

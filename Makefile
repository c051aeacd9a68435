# Needs python3 (3.11 or newer) with pip and venv, and make. Everything else is set up here.
PYTHON ?= python3
VENV   ?= .venv
# Which torch. A GPU machine may want its own build, a machine without one the small one:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
PY = $(VENV)/bin/python
# threads that wait give their core away: on a machine that does something else too, several times faster (measured: 5 to 8)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo lint test test-all soak circle backbones levers headline control table2 table3 table4 fig8 table5 coldstart layers students parts gpu gpu-rehearse bench bench-kernels bench-llm bench-data bench-serve clean

install: $(VENV)/ready       ## the environment in .venv, which all other targets make too (two minutes)

demo: $(VENV)/ready          ## ML-100K and a real LLM through all stages, then the table (13 minutes on 2 cores without fast bf16)
	$(PY) recipes/demo.py

lint: $(VENV)/ready          ## the code's form: ruff's rules (pyproject.toml) and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: lint                   ## the code's form, then all tests (seven to eleven minutes on 2 cores)
	$(PY) -m pytest -q -n 2 --dist worksteal tests

test-all: test gpu-rehearse  ## make test, the rehearsal of make gpu, the long tests, then every LM family that transformers knows against plain transformers (half an hour on 2 cores)
	$(PY) -m pytest -q -n 2 --dist worksteal tests/all
	$(PY) -m pytest -q -n 2 --dist worksteal -m long tests

soak: $(VENV)/ready          ## kill the scripts fifty times at random moments and compare (about ten minutes on 2 cores)
	$(PY) -m pytest -q -s tests/soak.py

circle: $(VENV)/ready        ## backbone, LM, small LM, backbone again: the methods that make it servable (99 minutes, one core a stage, beside other work)
	$(PY) recipes/circle.py

backbones: $(VENV)/ready     ## every conventional model in one table, no LM (hours on 2 cores): DATASET=beauty SEEDS=5 MODELS=sasrec,gru4rec JOBS=
	$(PY) recipes/backbones.py $(foreach x,DATASET SEEDS MODELS JOBS,$(if $($(x)),--$(shell echo $(x) | tr A-Z a-z) $($(x))))

levers: $(VENV)/ready        ## which levers make DELRec better, each with its control, by validation alone (many hours on 2 cores): DATASET=beauty LEVERS=residual,ema BUDGET= PROMPT_BUDGET= BATCH= JOBS=; what is kept in full, then the test part once: CARRY="titles+residual titles+residual+ema" SEEDS= TEST=
	$(PY) recipes/levers.py $(foreach x,DATASET LLM SEEDS BUDGET BATCH FOLDS LEVERS PROCS JOBS,$(if $($(x)),--$(shell echo $(x) | tr A-Z a-z) $($(x)))) $(if $(PROMPT_BUDGET),--prompt-budget $(PROMPT_BUDGET)) $(if $(TEST),--test-samples $(TEST)) $(foreach x,$(CARRY),--carry $(x))

# the paper's tables and figures; for ten GPUs: make table2 DATASET=beauty LLM=google/flan-t5-xl INPUT=titles PAPER=1 SEEDS=3 BUDGET=50000 PROCS=10 TEST=0 VAL=1000
RECIPE = $(foreach x,DATASET LLM SEEDS BUDGET BATCH FOLDS INPUT PROCS JOBS,$(if $($(x)),--$(shell echo $(x) | tr A-Z a-z) $($(x)))) $(if $(PROMPT_BUDGET),--prompt-budget $(PROMPT_BUDGET)) $(if $(BACKBONE_SEEDS),--backbone-seeds $(BACKBONE_SEEDS)) $(if $(TEST),--test-samples $(TEST)) $(if $(VAL),--val-samples $(VAL)) $(if $(PAPER),--paper) $(if $(CONTROLS),--controls) $(foreach x,$(ALSO),--also $(x))
headline: $(VENV)/ready      ## does DELRec beat its own backbone? README's table: five seeds of backbones, three of LMs, items as vectors (some three hours on 2 cores; BUDGET=12288 PROMPT_BUDGET=1024 TEST=0: in full)
	$(PY) recipes/tables.py headline --budget 4096 --prompt-budget 512 --test-samples 4000 $(RECIPE)

control: $(VENV)/ready       ## is it the language model? the headline's LM against random weights, small transformers trained whole, an MLP (SEEDS=1: an hour; BUDGET=12288 PROMPT_BUDGET=1024 TEST=0: in full)
	$(PY) recipes/tables.py control --budget 4096 --prompt-budget 512 --test-samples 4000 $(RECIPE)

table2 table3 table4 fig8 table5 coldstart: $(VENV)/ready   ## Tables II to V, Figure 8, cold users: DATASET= LLM= SEEDS= BUDGET= INPUT=titles|ids|hybrid PROMPT_BUDGET= PROCS= JOBS= TEST= VAL= ALSO= PAPER=1; table2 CONTROLS=1
	$(PY) recipes/tables.py $@ $(RECIPE)

layers: $(VENV)/ready        ## SLMRec's Figure 2: small LMs of each depth, with and without a teacher: BUDGET= SEEDS= ..
	$(PY) recipes/tables.py layers --budget 4096 --test-samples 0 $(RECIPE)

students: $(VENV)/ready      ## DLLM2Rec's three students, alone and taught by a small LM, out of fold (hours on 2 cores): DATASET=beauty SEEDS=1 FOLDS=3 BUDGET= ..
	$(PY) recipes/tables.py students --budget 8192 --test-samples 0 $(RECIPE)

parts: $(VENV)/ready         ## DLLM2Rec's parts on SASRec and Caser, out of fold: ALSO=beauty BUDGET= SEEDS= ..
	$(PY) recipes/tables.py parts --budget 8192 --test-samples 0 $(RECIPE)

# on a rented card there may be no network and no .venv: then this machine's own python, which has torch
gpu:                         ## every row that only a card fills, in at most nine minutes: WHEELS=folder OUT=folder (docs/gpu.md)
	$(if $(wildcard $(VENV)/ready),$(PY),$(PYTHON)) recipes/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT))

gpu-rehearse: $(VENV)/ready  ## the same program on a CPU, tiny shapes, Triton interpreted: every stage and every row (under three minutes on 2 cores)
	$(PY) recipes/gpu.py --rehearse --out runs/gpu-rehearsal

bench: bench-kernels bench-llm bench-data  ## all benchmarks (each program's last line is one JSON object)

bench-kernels: $(VENV)/ready ## the verbalizer against plain torch: time and memory (about six minutes on 2 cores)
	$(PY) kernels/bench.py

bench-llm: $(VENV)/ready     ## the LM's part of scoring and training against plain transformers (about fifteen minutes on 2 cores)
	$(PY) data/prepare.py ml-100k
	$(PY) -m delrec.lm.bench

bench-data: $(VENV)/ready    ## preparing and training 22 million interactions; RECBOLE=PYTHON compares with RecBole (about half an hour on 2 cores)
	$(PY) data/prepare.py ml-100k
	$(PY) data/bench.py $(if $(RECBOLE),--recbole $(RECBOLE))

bench-serve: $(VENV)/ready   ## a request to a backbone: torch, ONNX, 1.3 million items; delrec.Recommender (about five minutes on 2 cores)
	$(PY) data/prepare.py ml-100k
	$(PY) recipes/bench_serve.py
	test -e runs/ml-100k/bench-serve/config.json || $(PY) train_backbone.py --dataset ml-100k --epochs 2 --out ml-100k/bench-serve
	$(PY) recipes/bench_api.py ml-100k/bench-serve --users 100000 --threads 2

clean:                       ## remove the environment, prepared data and runs (the download cache stays)
	rm -rf $(VENV) runs data/ml-100k data/ml-100k@* data/ml-100k.unfinished data/ml-100k.replaced

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; give one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q $(TORCH)
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

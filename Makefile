.PHONY: all train test lint fmt doc book bench bench-parts coverage
all: lint test

train: ## the main job
	cargo run --release -- train

test:
	cargo test

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt:
	cargo fmt --all

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

book: ## needs mdbook: cargo install mdbook --locked
	mdbook build docs

bench: ## prefill, decode and LoRA training on this machine; FEATURES=metal or FEATURES=cuda, ARGUMENTS='--against mlx-lm'
	cargo run --release $(if $(FEATURES),--features $(FEATURES)) -- bench $(ARGUMENTS)

bench-parts: ## single operations, by criterion
	cargo bench --bench inference
	cargo bench --bench training

coverage: ## needs llvm-cov and llvm-profdata; LLVM=-19 where they are called llvm-cov-19
	dev/coverage.sh

//! Prefixes in a folder survive their slots and their process, change no answer, and are used for equal keys only.

use super::inference_generator::{adapter, argument, config, drawn, ids, model_of};
use super::inference_scheduler::Collected;
use super::kv_cache_types::models;
use candle_core::DType;
use metal_candle::inference::{KVCacheType, PrefixStorage, Request, Scheduler, SchedulerConfig};
use metal_candle::models::{MatmulPrecision, Model};
use metal_candle::ops::LowRankUpdates;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn storage(folder: &Path) -> PrefixStorage {
    PrefixStorage { folder: folder.join("prefixes"), max_bytes: 1 << 30 }
}

fn without_folder(model: &Model, kind: Option<KVCacheType>) -> Scheduler {
    let config = SchedulerConfig { max_sequences: 1, prefill_chunk: 64, step_tokens: 64, kv_cache: kind };
    Scheduler::with_config(model.clone(), config).unwrap()
}

fn scheduler(model: &Model, kind: Option<KVCacheType>, folder: &Path) -> Scheduler {
    without_folder(model, kind).with_prefix_storage(&storage(folder)).unwrap()
}

/// Tokens and bits of an answer, and how many tokens were reused and how many of them read from the folder.
fn run(scheduler: &mut Scheduler, request: Request) -> (Vec<(u32, u32)>, usize, usize) {
    let id = scheduler.admit(request).unwrap()[0];
    let pieces = Collected::run(scheduler).pieces.remove(&id).unwrap();
    let choices = pieces.iter().map(|piece| (piece.token, piece.log_probability.to_bits())).collect();
    let reused = pieces.last().unwrap().finish.as_ref().unwrap().reused_tokens;
    (choices, reused, scheduler.take_num_stored_tokens())
}

fn request(text: &[u32]) -> Request {
    Request::new(text, drawn(6, 3)).with_prefix_key(1)
}

/// Computes a text, and saves it as a process does at its end.
fn save(model: &Model, kind: Option<KVCacheType>, folder: &Path, text: &[u32]) {
    let mut scheduler = scheduler(model, kind, folder);
    assert_eq!(run(&mut scheduler, request(text)).1, 0);
    scheduler.save_prefixes();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(storage(folder).folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn an_answer_has_the_same_bits_with_a_prefix_of_another_process() {
    let mut all = models();
    all.truncate(2);
    all.push(("half", model_of(config(), DType::F16)));
    for (name, model) in all {
        let kinds: &[KVCacheType] =
            if name == "half" { &[KVCacheType::F16, KVCacheType::BF16] } else { &KVCacheType::ALL };
        for &kind in kinds {
            let folder = tempfile::tempdir().unwrap();
            save(&model, Some(kind), folder.path(), &ids(400));
            // the whole prompt, a longer and a shorter one, and another end
            let mut other = ids(430);
            other[300] = 0;
            for (text, reused) in [(ids(400), 399), (ids(450), 400), (ids(290), 289), (other, 300)] {
                let expected = run(&mut without_folder(&model, Some(kind)), request(&text)).0;
                let found = run(&mut scheduler(&model, Some(kind), folder.path()), request(&text));
                assert_eq!(found, (expected, reused, reused), "{name}, {kind}");
            }
        }
    }
}

#[test]
fn a_prefix_is_saved_when_its_slot_is_overwritten() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = scheduler(&model, None, folder.path());
    let other: Vec<u32> = ids(300).into_iter().rev().collect();
    let expected = run(&mut scheduler, request(&ids(300)));
    assert_eq!((expected.1, expected.2), (0, 0));
    assert_eq!(run(&mut scheduler, request(&other)).1, 0);
    // waits for the thread, and saves the second text, too
    scheduler.save_prefixes();
    assert_eq!(files(folder.path()).len(), 2);
    assert_eq!(run(&mut scheduler, request(&ids(300))), (expected.0.clone(), 299, 299));
    // from the slot
    assert_eq!(run(&mut scheduler, request(&ids(300))), (expected.0, 299, 0));
    // too short
    assert_eq!(run(&mut scheduler, request(&other[..256])).2, 0);
    scheduler.save_prefixes();
    assert_eq!(files(folder.path()).len(), 2, "nothing is saved twice");
    // a continued text replaces its beginning, one with few new tokens is not saved
    let longer: Vec<u32> = ids(300).into_iter().chain(other.iter().copied()).collect();
    assert_eq!(run(&mut scheduler, request(&longer)).2, 300);
    scheduler.save_prefixes();
    let total: u64 = files(folder.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(run(&mut scheduler, request(&[&longer[..], &[1; 200]].concat())).1, 600);
    scheduler.save_prefixes();
    assert_eq!(files(folder.path()).iter().map(|path| path.metadata().unwrap().len()).sum::<u64>(), total);
}

#[test]
fn a_short_prefix_is_not_saved() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    // 5 tokens of the answer are in the cache
    save(&model, None, folder.path(), &ids(250));
    assert_eq!(files(folder.path()).len(), 0);
    save(&model, None, folder.path(), &ids(251));
    assert_eq!(files(folder.path()).len(), 1);
}

/// A copy of the updates whose scale, or whose last B, differs.
fn changed(updates: &LowRankUpdates, change: impl Fn(&mut metal_candle::ops::LowRank)) -> LowRankUpdates {
    let mut copy = LowRankUpdates::new();
    let last = updates.iter().count() - 1;
    for (id, update) in updates.iter() {
        let mut update = update.clone();
        if id == last {
            change(&mut update);
        }
        copy.insert(id, update);
    }
    copy
}

#[test]
fn a_prefix_is_used_for_its_model_adapter_key_and_type_only() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let text = ids(300);
    let updates = adapter(&model, 1);
    let run_with = |model: &Model, kind, adapters: &[&LowRankUpdates], key: Option<u128>| {
        let mut scheduler = scheduler(model, kind, folder.path());
        let adapter = adapters.iter().map(|updates| scheduler.add_adapter(updates).unwrap()).last();
        let mut request = request(&text).with_adapter(adapter);
        request.prefix_key = key;
        (run(&mut scheduler, request), scheduler)
    };
    for adapters in [&[][..], &[&updates]] {
        let (found, mut scheduler) = run_with(&model, None, adapters, Some(1));
        assert_eq!((found.1, found.2), (0, 0));
        scheduler.save_prefixes();
    }
    let read = |model: &Model, kind, adapters: &[&LowRankUpdates], key| run_with(model, kind, adapters, key).0.2;
    assert_eq!(read(&model, None, &[], Some(1)), 299);
    // the type of the cache of f32 weights
    assert_eq!(read(&model, Some(KVCacheType::F32), &[], Some(1)), 299);
    // the adapter has another id
    let other = adapter(&model, 2);
    assert_eq!(read(&model, None, &[&other, &updates], Some(1)), 299);

    assert_eq!(read(&model, None, &[], Some(2)), 0);
    assert_eq!(read(&model, None, &[], Some(1 | 1 << 64)), 0);
    assert_eq!(read(&model, None, &[], None), 0);
    assert_eq!(read(&model, Some(KVCacheType::F16), &[], Some(1)), 0);
    assert_eq!(read(&model, None, &[&updates, &other], Some(1)), 0);
    let scaled = changed(&updates, |update| update.scale *= 1.5);
    let moved = changed(&updates, |update| update.b = (&update.b + 1.0).unwrap());
    for adapter in [&scaled, &moved] {
        assert_eq!(read(&model, None, &[adapter], Some(1)), 0);
    }
    // one weight, the dtype of the weights, a setting, and the precision of products
    let (name, weight) = model.parameters().last().unwrap();
    let mut values: Vec<f32> = weight.tensor().unwrap().flatten_all().unwrap().to_vec1().unwrap();
    *values.last_mut().unwrap() += 0.5;
    let weight = candle_core::Tensor::from_vec(values, weight.dims(), &candle_core::Device::Cpu).unwrap();
    let model_with_weight = model.with_parameters([(name.clone(), weight)].into()).unwrap();
    let mut other_config = config();
    other_config.rope_theta *= 2.0;
    for model in [model_with_weight, model_of(config(), DType::F16), model_of(other_config, DType::F32)] {
        assert_eq!(read(&model, Some(KVCacheType::F32), &[], Some(1)), 0);
    }
    assert_eq!(files(folder.path()).len(), 2);
    let brain = model_of(config(), DType::BF16);
    save(&brain, None, folder.path(), &text);
    assert_eq!(read(&brain, None, &[], Some(1)), 299);
    if let Ok(rounded) = brain.with_matmul_precision(MatmulPrecision::Bf16) {
        assert_eq!(read(&rounded, None, &[], Some(1)), 0);
    }
}

#[test]
fn damaged_and_forged_files_are_not_used() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let text = ids(300);
    save(&model, None, folder.path(), &text);
    let path = files(folder.path()).pop().unwrap();
    let whole = fs::read(&path).unwrap();
    let expected = run(&mut without_folder(&model, None), request(&text)).0;
    let with_sum = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.len() - 4);
        let sum = crc32c::crc32c(&bytes).to_le_bytes();
        bytes.extend(sum);
        bytes
    };
    assert_eq!(with_sum(whole.clone()), whole);
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let (length, scope, first_id) = (22, 30, 62);
    let contents = first_id + 305 * 4;
    let mut cases: Vec<Vec<u8>> = [0, 1, 21, 22, 29, 30, 61, 62, 63, contents - 1, contents, whole.len() - 1]
        .into_iter()
        .map(|length| whole[..length].to_vec())
        .collect();
    cases.extend([0, length, length + 3, scope, contents - 1, contents, whole.len() - 1].map(flipped));
    // with a checksum that fits
    let mut forged = vec![flipped(0), flipped(length), flipped(length + 7), flipped(scope), flipped(scope + 31)];
    let mut without_row = whole.clone();
    without_row.drain(contents..contents + 4);
    forged.extend([without_row, [&whole[..], &[0; 4]].concat()]);
    // fewer ids for the same contents, and ids of another text, which do not match the name
    let mut fewer = whole.clone();
    fewer.drain(contents - 4..contents);
    fewer[length..length + 8].copy_from_slice(&(32 + 304 * 4_u64).to_le_bytes());
    forged.push(fewer);
    cases.extend(forged.into_iter().map(with_sum));
    for (index, bytes) in cases.into_iter().enumerate() {
        fs::write(&path, &bytes).unwrap();
        let found = run(&mut scheduler(&model, None, folder.path()), request(&text));
        assert_eq!(found, (expected.clone(), 0, 0), "case {index} of {} bytes", bytes.len());
        assert!(!path.exists(), "case {index} is removed");
    }
    // ids that the search compares before the checksum is known: nothing in common, and all but one
    for id in [0, 299] {
        fs::write(&path, flipped(first_id + 4 * id)).unwrap();
        let found = run(&mut scheduler(&model, None, folder.path()), request(&text));
        assert_eq!(found, (expected.clone(), 0, 0), "id {id}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(run(&mut scheduler(&model, None, folder.path()), request(&text)), (expected, 299, 299));
}

#[test]
fn the_folder_has_a_limit_and_removes_the_least_recently_used() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let text = |first: u32| -> Vec<u32> { [first].into_iter().chain(ids(300)).collect() };
    save(&model, None, folder.path(), &text(0));
    let size = files(folder.path())[0].metadata().unwrap().len();
    let limited = |max_bytes: u64| {
        let storage = PrefixStorage { max_bytes, ..storage(folder.path()) };
        without_folder(&model, None).with_prefix_storage(&storage).unwrap()
    };
    for first in 1..3 {
        // files of one moment have no order
        for path in files(folder.path()) {
            let file = fs::File::options().write(true).open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.set_modified(modified - Duration::from_secs(10)).unwrap();
        }
        let mut scheduler = limited(2 * size + 1);
        // reading the first counts as use
        assert_eq!(run(&mut scheduler, request(&text(0))).2, 300);
        run(&mut scheduler, request(&text(first)));
        scheduler.save_prefixes();
        assert_eq!(files(folder.path()).len(), 2);
    }
    let read = |first| run(&mut limited(2 * size + 1), request(&text(first))).2;
    assert_eq!([read(0), read(1), read(2)], [300, 0, 300]);
    let mut small = limited(size - 1);
    run(&mut small, request(&text(3)));
    small.save_prefixes();
    assert_eq!(files(folder.path()).len(), 2, "a file that is too large is not written");
}

#[test]
fn processes_share_a_folder() {
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let (mut first, mut second) = (scheduler(&model, None, folder.path()), scheduler(&model, None, folder.path()));
    let other: Vec<u32> = ids(300).into_iter().rev().collect();
    run(&mut first, request(&ids(300)));
    run(&mut second, request(&other));
    first.save_prefixes();
    second.save_prefixes();
    let expected = run(&mut without_folder(&model, None), request(&ids(300))).0;
    assert_eq!(run(&mut second, request(&ids(300))), (expected, 299, 299));
    // a file that another process removes
    for path in files(folder.path()) {
        fs::remove_file(path).unwrap();
    }
    let expected = run(&mut without_folder(&model, None), request(&other)).0;
    assert_eq!(run(&mut first, request(&other)), (expected, 0, 0));
    // both write and read at the same time
    let texts = |first: u32| (0..6).map(move |i| -> Vec<u32> { [first * 6 + i].into_iter().chain(ids(280)).collect() });
    let threads = [first, second].into_iter().zip(0..).map(|(mut scheduler, index)| {
        std::thread::spawn(move || {
            for text in texts(index).chain(texts(0)) {
                run(&mut scheduler, request(&text));
            }
            scheduler.save_prefixes();
        })
    });
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
    let mut total = 0;
    for text in texts(0).chain(texts(1)) {
        let expected = run(&mut without_folder(&model, None), request(&text)).0;
        let (found, _, read) = run(&mut scheduler(&model, None, folder.path()), request(&text));
        assert_eq!(found, expected);
        total += read;
    }
    // some are dropped if the disk is slow
    assert!(total >= 2 * 280, "{total}");
}

#[cfg(unix)]
#[test]
fn only_the_owner_may_read_folder_and_files() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let model = model_of(config(), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    save(&model, None, folder.path(), &ids(300));
    assert_eq!(mode(&storage(folder.path()).folder), 0o700);
    assert_eq!(files(folder.path()).iter().map(|path| mode(path)).collect::<Vec<_>>(), [0o600]);
    fs::set_permissions(storage(folder.path()).folder, fs::Permissions::from_mode(0o750)).unwrap();
    let error = without_folder(&model, None).with_prefix_storage(&storage(folder.path())).unwrap_err().to_string();
    assert!(error.contains("mode 700") && error.contains("found mode 750"), "{error}");
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_of(config(), DType::F32);
    let mut scheduler = without_folder(&model, None);
    scheduler.add_adapter(&adapter(&model, 1)).unwrap();
    let error = scheduler.with_prefix_storage(&storage(folder.path())).unwrap_err();
    assert!(argument(&error).1.contains("before adapters"), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let wrong = PrefixStorage { folder: file, max_bytes: 1 };
    assert!(without_folder(&model, None).with_prefix_storage(&wrong).is_err());
    // files of others are neither read nor removed
    let foreign = storage(folder.path()).folder.join(format!("{}-{}.prefix", "0".repeat(32), "0".repeat(16)));
    save(&model, None, folder.path(), &ids(300));
    fs::write(&foreign, "text").unwrap();
    fs::File::options().write(true).open(&foreign).unwrap().set_modified(SystemTime::now()).unwrap();
    let found = run(&mut self::scheduler(&model, None, folder.path()), request(&ids(300)));
    assert_eq!(found.2, 299);
    assert!(foreign.exists());
}

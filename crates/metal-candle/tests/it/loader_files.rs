//! Safetensors files: whole, cut, flipped, forged and foreign.

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use metal_candle::Error;
use metal_candle::models::{SafetensorsFile, write_safetensors};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn file(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("file.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Opens bytes as a file and reads all there is.
fn open(folder: &Path, bytes: &[u8]) -> Result<SafetensorsFile, Error> {
    let file = SafetensorsFile::open(file(folder, bytes))?;
    for entry in file.entries() {
        assert_eq!(file.bytes(&entry.name)?.len(), entry.num_bytes());
        if entry.is_float() {
            assert_eq!(file.float_tensor(&entry.name, DType::F32)?.dims(), entry.shape);
        }
    }
    Ok(file)
}

fn valid() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},"c":{"dtype":"F16","shape":[],"data_offsets":[22,24]}}  "#;
    let mut data: Vec<u8> = [1.0_f32, -2.0, 3.5, 0.25].iter().flat_map(|x| x.to_le_bytes()).collect();
    data.extend([1.0_f32, 2.0, -4.0].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
    data.extend(f16::from_f32(0.5).to_le_bytes());
    with_header(header, &data)
}

#[test]
fn values_shapes_and_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(folder.path(), &valid()).unwrap();
    assert_eq!(file.metadata().get("format").map(String::as_str), Some("pt"));
    let names: Vec<_> = file.entries().iter().map(|e| (e.name.as_str(), e.dtype, e.shape.clone())).collect();
    assert_eq!(names, [("a", "F32", vec![2, 2]), ("b", "BF16", vec![3]), ("c", "F16", vec![])]);
    assert_eq!(file.tensor("a").unwrap().to_vec2::<f32>().unwrap(), [[1.0, -2.0], [3.5, 0.25]]);
    assert_eq!(file.tensor("b").unwrap().dtype(), DType::BF16);
    assert_eq!(file.float_tensor("b", DType::F32).unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0, -4.0]);
    assert!((file.float_tensor("c", DType::F32).unwrap().to_scalar::<f32>().unwrap() - 0.5).abs() < 1e-9);
    assert!(file.entry("d").is_none());
    let text = file.tensor("d").unwrap_err().to_string();
    assert!(text.contains("`d`") && text.contains("file.safetensors"), "{text}");
}

#[test]
fn every_conversion_rounds_as_candle_does() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..10_007).map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) * 0.013_7 + 1e-4).collect();
    let source = Tensor::from_vec(values, 10_007, &candle_core::Device::Cpu).unwrap();
    let path = folder.path().join("all.safetensors");
    let dtypes = [DType::F64, DType::F32, DType::F16, DType::BF16];
    let tensors: Vec<(String, Tensor)> =
        dtypes.iter().map(|&d| (d.as_str().to_string(), source.to_dtype(d).unwrap())).collect();
    write_safetensors(&path, &tensors, &[]).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    for (name, tensor) in &tensors {
        assert_eq!(
            file.tensor(name).unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap(),
            tensor.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap(),
            "{name}"
        );
        for to in [DType::F32, DType::F16, DType::BF16] {
            let found = file.float_tensor(name, to).unwrap();
            assert_eq!(found.dtype(), to);
            let expected = tensor.to_dtype(DType::F32).unwrap().to_dtype(to).unwrap();
            let as_f32 = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(as_f32(&found), as_f32(&expected), "{name} to {to:?}");
        }
    }
}

#[test]
fn values_that_do_not_fit_are_refused_but_infinities_pass() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    let cpu = candle_core::Device::Cpu;
    let tensors =
        [("large", Tensor::new(&[1.0_f32, 1e6], &cpu).unwrap()), ("wide", Tensor::new(&[1e300_f64], &cpu).unwrap())];
    write_safetensors(&path, &tensors, &[]).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    let text = file.float_tensor("large", DType::F16).unwrap_err().to_string();
    assert!(text.contains("`large`") && text.contains("f16"), "{text}");
    assert_eq!(file.float_tensor("large", DType::BF16).unwrap().dtype(), DType::BF16);
    assert!(file.float_tensor("wide", DType::F32).unwrap_err().to_string().contains("`wide`"));

    // such a file is read, but never written
    let infinite = Tensor::new(&[1.0_f32, f32::INFINITY, f32::NAN], &cpu).unwrap();
    let refused = write_safetensors(folder.path().join("refused"), &[("infinite", infinite)], &[]).unwrap_err();
    assert!(refused.to_string().contains("`infinite`") && !folder.path().join("refused").exists(), "{refused}");
    let header = r#"{"infinite":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#;
    let values: Vec<u8> = [1.0_f32, f32::INFINITY, f32::NAN].iter().flat_map(|value| value.to_le_bytes()).collect();
    let file = SafetensorsFile::open(self::file(folder.path(), &with_header(header, &values))).unwrap();
    let passed = file.float_tensor("infinite", DType::F16).unwrap().to_vec1::<f16>().unwrap();
    assert!(passed[1].is_infinite() && passed[2].is_nan());
}

#[test]
fn integers_are_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let header = r#"{"q":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"i":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}"#;
    let file = SafetensorsFile::open(file(folder.path(), &with_header(header, &[1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0])))
        .unwrap();
    assert_eq!(file.tensor("i").unwrap().to_vec1::<i64>().unwrap(), [7]);
    let text = file.float_tensor("i", DType::F32).unwrap_err().to_string();
    assert!(text.contains("`i`") && text.contains("I64"), "{text}");
    let text = file.tensor("q").unwrap_err().to_string();
    assert!(text.contains("`q`") && text.contains("F8_E4M3"), "{text}");
}

#[test]
fn each_lie_of_a_header_is_named() {
    let one = |entry: &str| format!("{{\"t\":{entry}}}");
    let sixteen = [0_u8; 16];
    let cases: Vec<(String, &[u8], &str)> = vec![
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,12]}"#), &sixteen, "is 16 bytes, but its offsets span 12"),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#), &sixteen[..8], "truncated"),
        (one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#), &sixteen, "end at byte 12, but there are 16"),
        (one(r#"{"dtype":"F32","shape":[3],"data_offsets":[4,16]}"#), &sixteen, "bytes 0 to 4"),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[16,0]}"#), &sixteen, "ends before it"),
        (one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}"#), &sixteen, "overflows"),
        (one(r#"{"dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,0]}"#), &[], "overflows"),
        (one(r#"{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}"#), &sixteen, "overflows"),
        (one(r#"{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}"#), &sixteen, "truncated"),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,18446744073709551615]}"#), &sixteen, "span 15"),
        (one(r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,16]}"#), &sixteen, "`t`"),
        (one(r#"{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}"#), &sixteen, "`t`"),
        (one(r#"{"dtype":"F32","shape":[4.5],"data_offsets":[0,16]}"#), &sixteen, "`t`"),
        (one(r#"{"dtype":"F32","shape":"4","data_offsets":[0,16]}"#), &sixteen, "shape"),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0]}"#), &sixteen, "`t`"),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16,32]}"#), &sixteen, "`t`"),
        (one(r#"{"dtype":"F32","shape":[4]}"#), &sixteen, "data_offsets"),
        (one(r#"{"shape":[4],"data_offsets":[0,16]}"#), &sixteen, "dtype"),
        (one(r#"{"dtype":"F31","shape":[4],"data_offsets":[0,16]}"#), &sixteen, "unknown dtype `F31`"),
        (one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#), &[0], "whole bytes"),
        (one(r#"{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}"#), &[0], "16 sizes"),
        (one("3"), &[], "`t`"),
        (
            r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"u":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#.into(),
            &sixteen[..6],
            "inside the previous tensor",
        ),
        (
            r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#.into(),
            &sixteen[..2],
            "`t` is in the header twice",
        ),
        (r#"{"__metadata__":{"step":3}}"#.into(), &[], "__metadata__"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), &[], "twice"),
        ("{".into(), &[], "EOF"),
        ("{}".into(), &[0], "but there are 1"),
        ("{} x".into(), &[], "trailing"),
        ("{\"\u{fffd}\":".into(), &[], "EOF"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (header, data, words) in cases {
        let error = open(folder.path(), &with_header(&header, data)).expect_err(&header);
        assert!(matches!(error, Error::Format { .. }), "{header}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("file.safetensors"), "{header}: {text}");
    }
}

#[test]
fn headers_of_too_many_tensors_are_refused() {
    let tensors: Vec<String> =
        (0..200_001).map(|i| format!(r#""t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let folder = tempfile::tempdir().unwrap();
    let error = open(folder.path(), &with_header(&format!("{{{}}}", tensors.join(",")), &[])).unwrap_err().to_string();
    assert!(error.contains("expected at most 200000 tensors"), "{error}");
    open(folder.path(), &with_header(&format!("{{{}}}", tensors[1..].join(",")), &[])).unwrap();
}

#[test]
fn edge_cases_that_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    assert!(open(folder.path(), &with_header("{}", &[])).unwrap().entries().is_empty());
    let header = r#"{"none":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},"last":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},"__metadata__":null}"#;
    let file = open(folder.path(), &with_header(header, &[9])).unwrap();
    assert_eq!(file.entries().len(), 3);
    assert_eq!(file.float_tensor("none", DType::F16).unwrap().dims(), [0, 7]);
}

#[test]
fn foreign_files_are_recognized() {
    let folder = tempfile::tempdir().unwrap();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n";
    let cases: &[(&[u8], &str)] = &[
        (b"", "empty"),
        (b"abc", "truncated"),
        (b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0\x1a", "GGUF"),
        (b"PK\x03\x04\0\0\x08\x08\0\0\0\0model/data.pkl", "PyTorch"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (pointer, "git lfs pull"),
        (b"<!DOCTYPE html><html><title>404</title>", "web page"),
        (b"\n <HTML>Sign in", "web page"),
        (b"{\"model_type\": \"qwen2\"}", "JSON"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "NumPy"),
        (&[0; 64], "zeros"),
        (b"\x10\0\0\0\0\0\0\0not a header....", "not a safetensors file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{\"a\":", "at most 100000000"),
        (b"\xff\xff\0\0\0\0\0\0{\"a\":", "truncated"),
    ];
    for (bytes, word) in cases {
        let error = open(folder.path(), bytes).expect_err(word);
        assert!(matches!(error, Error::Format { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "expected {word}: {error}");
    }
    // a header of 640 bytes begins with the two bytes of a pickle
    let header = format!("{{}}{}", " ".repeat(638));
    assert_eq!(&with_header(&header, &[])[..2], [0x80, 2]);
    assert!(open(folder.path(), &with_header(&header, &[])).unwrap().entries().is_empty());
    let error = SafetensorsFile::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error:?}");
}

#[test]
fn every_cut_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = valid();
    for length in 0..bytes.len() {
        let error = open(folder.path(), &bytes[..length]).expect_err("a cut file");
        assert!(matches!(error, Error::Format { .. }), "cut at {length}: {error:?}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(open(folder.path(), &longer).unwrap_err().to_string().contains("end at byte 24, but there are 25"));
}

#[test]
fn no_flipped_byte_panics() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = valid();
    let header_end = bytes.len() - 24;
    let (mut refused, mut accepted) = (0, 0);
    for position in 0..header_end {
        for flip in [0x01, 0x02, 0x10, 0x20, 0x80, 0xff] {
            let mut flipped = bytes.clone();
            flipped[position] ^= flip;
            match open(folder.path(), &flipped) {
                Ok(file) => {
                    accepted += 1;
                    let total: usize = file.entries().iter().map(metal_candle::models::TensorEntry::num_bytes).sum();
                    assert_eq!(total, 24);
                }
                Err(Error::Format { .. }) => refused += 1,
                Err(other) => panic!("byte {position}: {other:?}"),
            }
        }
    }
    assert!(refused > accepted && accepted > 0, "{refused} refused, {accepted} accepted");
}

#[test]
fn written_files_are_aligned_and_replaced_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let cpu = candle_core::Device::Cpu;
    let half = Tensor::new(&[1.5_f32, 2.5, -3.5], &cpu).unwrap().to_dtype(DType::BF16).unwrap();
    let full = Tensor::new(&[[1_u32, 2], [3, 4]], &cpu).unwrap().t().unwrap();
    write_safetensors(&path, &[("half", half), ("full", full)], &[("format", "pt"), ("quote\"", "line\n")]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.entries()[0].name, "full", "wide dtypes come first");
    assert_eq!(file.tensor("full").unwrap().to_vec2::<u32>().unwrap(), [[1, 3], [2, 4]]);
    assert_eq!(file.float_tensor("half", DType::F32).unwrap().to_vec1::<f32>().unwrap(), [1.5, 2.5, -3.5]);
    assert_eq!(file.metadata().get("quote\"").map(String::as_str), Some("line\n"));
    // the reference implementation reads it too
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.tensor("half").unwrap().shape(), [3]);

    let twice = [("x", Tensor::new(1_f32, &cpu).unwrap()), ("x", Tensor::new(2_f32, &cpu).unwrap())];
    let text = write_safetensors(&path, &twice, &[]).unwrap_err().to_string();
    assert!(text.contains("`x`"), "{text}");
    let failed = metal_candle::models::write_atomically(&path, |file| {
        file.write_all(b"half of it")?;
        Err(std::io::Error::other("disk full"))
    });
    assert!(matches!(failed, Err(Error::Write { path: named, .. }) if named == path));
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "a failed write leaves the old file");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "and no temporary file");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_edit_of_the_header_panics(
        edits in prop::collection::vec((0_usize..180, prop::sample::select(vec![
            "0", "9", "99999999999", "-1", "1e9", "[", "]", "{", "}", "\"", ",", ":", "null", "F64", "I8", "[0,0]", "\u{0}",
            "18446744073709551615", "\"dtype\":\"F32\"", "", "\\u0000", "\\ud800",
        ]), 0_usize..6), 1..5),
        fix_length in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let bytes = valid();
        let (header, data) = (&bytes[8..bytes.len() - 24], &bytes[bytes.len() - 24..]);
        let mut text = String::from_utf8(header.to_vec()).unwrap();
        for (position, insert, remove) in edits {
            let begin = position.min(text.len());
            let end = (begin + remove).min(text.len());
            if text.is_char_boundary(begin) && text.is_char_boundary(end) {
                text.replace_range(begin..end, insert);
            }
        }
        let mut edited = with_header(&text, data);
        if !fix_length {
            edited[..8].copy_from_slice(&bytes[..8]);
        }
        if let Err(error) = open(folder.path(), &edited) {
            prop_assert!(matches!(error, Error::Format { .. }), "{error:?}");
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = tempfile::tempdir().unwrap();
        if let Err(error) = open(folder.path(), &bytes) {
            prop_assert!(matches!(error, Error::Format { .. }), "{error:?}");
        }
    }
}

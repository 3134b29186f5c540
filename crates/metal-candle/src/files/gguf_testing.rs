//! Writes small GGUF files for tests.

use super::GgufValue;

const ALIGNMENT: usize = 32;

/// The bytes of a GGUF file with this metadata and these tensors: name, shape (the last dimension is contiguous), `ggml_type`
/// and data. Integers become `i64`, those of lists `i32`; floats become `f32`.
pub(crate) fn write(metadata: &[(&str, GgufValue)], tensors: &[(&str, &[usize], u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut bytes, key);
        bytes.extend(type_of(value, false).to_le_bytes());
        put_value(&mut bytes, value, false);
    }
    let mut offset = 0_usize;
    for (name, shape, ggml_type, data) in tensors {
        put_text(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            bytes.extend((*size as u64).to_le_bytes());
        }
        bytes.extend(ggml_type.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset = (offset + data.len()).next_multiple_of(ALIGNMENT);
    }
    for (_, _, _, data) in tensors {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(data);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    bytes
}

fn type_of(value: &GgufValue, is_item: bool) -> u32 {
    match value {
        GgufValue::Integer(_) if is_item => 5,
        GgufValue::Integer(_) => 11,
        GgufValue::Float(_) => 6,
        GgufValue::Flag(_) => 7,
        GgufValue::Text(_) => 8,
        GgufValue::List(_) => 9,
    }
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue, is_item: bool) {
    match value {
        GgufValue::Integer(number) if is_item => bytes.extend((*number as i32).to_le_bytes()),
        GgufValue::Integer(number) => bytes.extend((*number as i64).to_le_bytes()),
        GgufValue::Float(number) => bytes.extend((*number as f32).to_le_bytes()),
        GgufValue::Flag(flag) => bytes.push(u8::from(*flag)),
        GgufValue::Text(text) => put_text(bytes, text),
        GgufValue::List(values) => {
            bytes.extend(values.first().map_or(4, |value| type_of(value, true)).to_le_bytes());
            bytes.extend((values.len() as u64).to_le_bytes());
            for value in values {
                put_value(bytes, value, true);
            }
        }
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

//! Reading TensorBoard event files back.

/// A scalar of an event file.
#[derive(Debug, Clone, PartialEq)]
pub struct Scalar {
    pub step: u64,
    pub tag: String,
    pub value: f32,
}

/// All scalars; checksums and the version are checked on the way.
pub fn scalars(mut bytes: &[u8]) -> Vec<Scalar> {
    let mut scalars = Vec::new();
    let mut number = 0;
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(masked(&bytes[..8]), word(&bytes[8..12]), "length of record {number}");
        let payload = &bytes[12..12 + length];
        assert_eq!(masked(payload), word(&bytes[12 + length..16 + length]), "record {number}");
        bytes = &bytes[16 + length..];
        let event = fields(payload);
        let find = |field: u64| event.iter().find(|(number, _)| *number == field).map(|(_, value)| value);
        assert!(matches!(find(1), Some(Field::Fixed64(_))), "record {number} has no time");
        if number == 0 {
            assert_eq!(find(3), Some(&Field::Bytes(b"brain.Event:2")));
        }
        let step = match find(2) {
            Some(Field::Varint(step)) => *step,
            _ => 0,
        };
        if let Some(Field::Bytes(summary)) = find(5) {
            for (_, value) in fields(summary) {
                let Field::Bytes(value) = value else { panic!("a summary holds messages") };
                let [(1, Field::Bytes(tag)), (2, Field::Fixed32(value))] = fields(value)[..] else {
                    panic!("a value holds a tag and a number")
                };
                scalars.push(Scalar {
                    step,
                    tag: String::from_utf8(tag.to_vec()).unwrap(),
                    value: f32::from_bits(value),
                });
            }
        }
        number += 1;
    }
    scalars
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Field<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Varint(varint(&mut bytes)),
            1 => Field::Fixed64(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length))
            }
            5 => Field::Fixed32(word(take(&mut bytes, 4))),
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, field));
    }
    found
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().unwrap())
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

//! Implements `str.format` and `%` formatting.

use super::args::pay_bytes;
use super::python::{invalid, number, repr, str_of};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, State};

/// Largest width or precision.
const MAX_WIDTH: usize = 100_000;

/// `text.format(*args)`. Values without a format print like in Python.
pub(super) fn str_format(state: &State, text: &str, args: &[Value]) -> Result<String, Error> {
    check_widths(state, text)?;
    let is_plain = !text.contains([':', '!', '.', '[']);
    let shown = |value: &Value| match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if is_plain && !value.is_kwargs() => {
            str_of(value).map(Value::from)
        }
        _ => Ok(value.clone()),
    };
    let args = args.iter().map(shown).collect::<Result<Vec<_>, _>>()?;
    format(FormatStyle::StrFormat, text, &args)
}

/// Returns an error for a format with excessive widths.
fn check_widths(state: &State, text: &str) -> Result<(), Error> {
    let mut total = 0_usize;
    for digits in text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
        total = total.saturating_add(digits.parse::<usize>().unwrap_or(usize::MAX));
    }
    pay_bytes(state, total)
}

/// One `%` directive.
struct Directive {
    is_left: bool,
    is_zero: bool,
    is_alternate: bool,
    sign: &'static str,
    width: usize,
    precision: Option<usize>,
}

/// `text % values`; `values` are a tuple's items, or one value.
pub(super) fn percent(state: &State, text: &str, values: &Value) -> Result<String, Error> {
    let items: Vec<Value> = if values.is_tuple() { values.try_iter()?.collect() } else { vec![values.clone()] };
    let mut items = items.into_iter();
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    let mut has_names = false;
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut named = None;
        if chars.next_if_eq(&'(').is_some() {
            let key: String = chars.by_ref().take_while(|&c| c != ')').collect();
            if values.kind() != ValueKind::Map {
                return Err(invalid("`%`: the format requires a mapping"));
            }
            let value = values.get_item(&Value::from(key.as_str()))?;
            if value.is_undefined() {
                return Err(invalid(format!("`%`: the mapping has no key `{key}`")));
            }
            named = Some(value);
            has_names = true;
        }
        let mut next = || items.next().ok_or_else(|| invalid("`%`: not enough arguments for the format"));
        let mut directive =
            Directive { is_left: false, is_zero: false, is_alternate: false, sign: "", width: 0, precision: None };
        while let Some(flag) = chars.next_if(|c| "-0+ #".contains(*c)) {
            match flag {
                '-' => directive.is_left = true,
                '0' => directive.is_zero = true,
                '+' => directive.sign = "+",
                '#' => directive.is_alternate = true,
                _ if directive.sign.is_empty() => directive.sign = " ",
                _ => {}
            }
        }
        let mut size = |chars: &mut std::iter::Peekable<std::str::Chars>| -> Result<usize, Error> {
            let size = if chars.next_if_eq(&'*').is_some() {
                let size = next()?.as_i64().ok_or_else(|| invalid("`%`: `*` needs an integer"))?;
                directive.is_left |= size < 0;
                usize::try_from(size.unsigned_abs()).unwrap_or(usize::MAX)
            } else {
                let digits: String = std::iter::from_fn(|| chars.next_if(char::is_ascii_digit)).collect();
                if digits.is_empty() { 0 } else { digits.parse().unwrap_or(usize::MAX) }
            };
            if size > MAX_WIDTH {
                return Err(invalid(format!("`%`: expected a width of at most {MAX_WIDTH}")));
            }
            Ok(size)
        };
        let width = size(&mut chars)?;
        let precision = if chars.next_if_eq(&'.').is_some() { Some(size(&mut chars)?) } else { None };
        (directive.width, directive.precision) = (width, precision);
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let code = chars.next().ok_or_else(|| invalid("`%`: the format is incomplete"))?;
        if code == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        let shown = directive.show(code, &value)?;
        pay_bytes(state, shown.len())?;
        out.push_str(&shown);
    }
    if values.kind() != ValueKind::Map && !has_names && items.next().is_some() {
        return Err(invalid("`%`: not all arguments are used by the format"));
    }
    Ok(out)
}

impl Directive {
    fn show(&self, code: char, value: &Value) -> Result<String, Error> {
        let (sign, digits) = match code {
            's' | 'r' | 'a' => {
                let text = if code == 's' { str_of(value)? } else { repr(value)? };
                let text: String = text.chars().take(self.precision.unwrap_or(usize::MAX)).collect();
                return Ok(self.pad("", &text, false));
            }
            'c' => {
                let code_point = value.as_i64().and_then(|code| u32::try_from(code).ok()).and_then(char::from_u32);
                let text = code_point.map(String::from).or_else(|| value.as_str().map(str::to_string));
                let text = text.filter(|text| text.chars().count() == 1);
                let text = text.ok_or_else(|| invalid("`%c` needs an integer or one character"))?;
                return Ok(self.pad("", &text, false));
            }
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                let is_float = value.kind() == ValueKind::Number && !value.is_integer();
                let integer = match (i128::try_from(value.clone()), f64::try_from(value.clone())) {
                    (Ok(integer), _) => integer,
                    (_, Ok(float)) if is_float && float.is_finite() && "diu".contains(code) => float.trunc() as i128,
                    _ => return Err(invalid(format!("`%{code}` needs a number, found {}", value.kind()))),
                };
                let magnitude = integer.unsigned_abs();
                let digits = match code {
                    'x' => format!("{magnitude:x}"),
                    'X' => format!("{magnitude:X}"),
                    'o' => format!("{magnitude:o}"),
                    _ => magnitude.to_string(),
                };
                let digits = format!("{digits:0>width$}", width = self.precision.unwrap_or(0));
                let prefix = match code {
                    'x' | 'X' | 'o' if self.is_alternate => format!("0{code}"),
                    _ => String::new(),
                };
                (format!("{}{prefix}", if integer < 0 { "-" } else { self.sign }), digits)
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                let float = f64::try_from(value.clone()).ok().filter(|_| value.kind() != ValueKind::String);
                let float =
                    float.ok_or_else(|| invalid(format!("`%{code}` needs a number, found {}", value.kind())))?;
                let digits = float_digits(
                    float.abs(),
                    code.to_ascii_lowercase(),
                    self.precision.unwrap_or(6),
                    self.is_alternate,
                );
                let digits = if code.is_ascii_uppercase() { digits.to_uppercase() } else { digits };
                let is_negative = float.is_sign_negative() && !float.is_nan();
                (if is_negative { "-" } else { self.sign }.to_string(), digits)
            }
            other => return Err(invalid(format!("`%`: unsupported format character `{other}`"))),
        };
        Ok(self.pad(&sign, &digits, self.is_zero && !self.is_left))
    }

    fn pad(&self, sign: &str, text: &str, with_zeros: bool) -> String {
        let missing = self.width.saturating_sub(sign.len() + text.chars().count());
        match (self.is_left, with_zeros) {
            (true, _) => format!("{sign}{text}{}", " ".repeat(missing)),
            (false, true) => format!("{sign}{}{text}", "0".repeat(missing)),
            (false, false) => format!("{}{sign}{text}", " ".repeat(missing)),
        }
    }
}

fn float_digits(float: f64, code: char, precision: usize, keep_zeros: bool) -> String {
    if !float.is_finite() {
        return number(&Value::from(float), "nan", "inf");
    }
    let scientific = |precision: usize| {
        let text = format!("{float:.precision$e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        (digits.to_string(), exponent.parse::<i32>().unwrap_or(0))
    };
    let exponent_text = |exponent: i32| format!("e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    match code {
        'f' => format!("{float:.precision$}"),
        'e' => {
            let (digits, exponent) = scientific(precision);
            digits + &exponent_text(exponent)
        }
        _ => {
            let precision = precision.max(1);
            let (digits, exponent) = scientific(precision - 1);
            let is_scientific = exponent < -4 || exponent >= precision as i32;
            let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or(0);
            let digits = if is_scientific { digits } else { format!("{float:.decimals$}") };
            let digits = if digits.contains('.') && !keep_zeros {
                digits.trim_end_matches('0').trim_end_matches('.').to_string()
            } else {
                digits
            };
            if is_scientific { digits + &exponent_text(exponent) } else { digits }
        }
    }
}

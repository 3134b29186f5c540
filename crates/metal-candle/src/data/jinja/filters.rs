//! Jinja2's filters and tests that the engine lacks or defines differently.

// the engine passes arguments by value
#![allow(clippy::needless_pass_by_value)]

use super::args::{Args, pay_bytes, pay_items};
use super::format::percent;
use super::methods::{capitalized, is_space};
use super::python::{dumps, invalid, is_namespace, number, repr, str_of};
use super::source::{GENERATION_END, GENERATION_START, MARK, PERCENT, PLUS, PRINTED};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, State};
use std::fmt::Write;

/// Installs the filters, tests and value formatting in an environment.
// one line per filter
#[allow(clippy::too_many_lines)]
pub(in crate::data) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| {
        let is_escaped = !matches!(state.auto_escape(), AutoEscape::None) && !value.is_safe();
        let text = match value.as_str() {
            Some(text) if !is_escaped && value.kind() == ValueKind::String => {
                return out.write_str(text).map_err(Error::from);
            }
            _ => str_of(value)?,
        };
        let text = if is_escaped { escaped(&text) } else { text };
        out.write_str(&text).map_err(Error::from)
    });
    environment.add_filter("tojson", |state: &State, value: &Value, kwargs: Kwargs| {
        let text = dumps(value, &kwargs)?;
        pay_bytes(state, text.len())?;
        Ok::<_, Error>(text)
    });
    environment.add_function(MARK, |is_start: bool, writes_marks: &Value, _caller: Kwargs| match is_start {
        _ if !writes_marks.is_true() => String::new(),
        true => GENERATION_START.to_string(),
        false => GENERATION_END.to_string(),
    });
    add_tests(environment);
    let mut text = |name: &'static str, filter: TextFilter| {
        environment.add_filter(name, move |state: &State, value: &Value, args: Rest<Value>, keywords: Kwargs| {
            let text = str_of(value)?;
            pay_bytes(state, text.len())?;
            let mut args = Args::of(name, &args, keywords);
            let made = filter(state, &text, &mut args)?;
            pay_bytes(state, made.len())?;
            args.end()?;
            Ok::<_, Error>(if value.is_safe() { Value::from_safe_string(made) } else { Value::from(made) })
        });
    };
    text("string", |_, text, _| Ok(text.to_string()));
    text("upper", |_, text, _| Ok(text.to_uppercase()));
    text("lower", |_, text, _| Ok(text.to_lowercase()));
    text("capitalize", |_, text, _| Ok(capitalized(text)));
    text("title", |_, text, _| Ok(titled(text)));
    text("trim", |_, text, args| {
        let chars = args.optional_text("chars")?;
        Ok(text.trim_matches(|c| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c))).to_string())
    });
    text("replace", replace);
    text("truncate", truncate);
    text("wordwrap", wordwrap);
    text("indent", indent);
    text("center", |state, text, args| {
        let width = usize::try_from(args.integer("width", 80)?).unwrap_or(0);
        let missing = width.saturating_sub(text.chars().count());
        pay_bytes(state, missing)?;
        let left = missing / 2 + (missing & width & 1);
        Ok(format!("{}{text}{}", " ".repeat(left), " ".repeat(missing - left)))
    });
    text("striptags", |_, text, _| Ok(strip_tags(text)));
    text("filesizeformat", |_, text, args| {
        let is_binary = args.flag("binary", false)?;
        let bytes: f64 = text.trim().parse().map_err(|_| args.wrong("expected a number"))?;
        Ok(file_size(bytes, is_binary))
    });
    environment.add_filter("wordcount", |state: &State, value: &Value| {
        let text = str_of(value)?;
        pay_bytes(state, text.len())?;
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        Ok::<_, Error>(words.count())
    });
    for name in ["e", "escape"] {
        environment.add_filter(
            name,
            |state: &State, value: &Value| {
                if value.is_safe() { Ok(value.clone()) } else { force_escape(state, value) }
            },
        );
    }
    environment.add_filter("forceescape", force_escape);
    environment.add_filter("safe", |value: &Value| str_of(value).map(Value::from_safe_string));
    environment.add_filter(PLUS, plus);
    environment.add_filter("int", to_int);
    environment.add_filter("float", |value: &Value, args: Rest<Value>, keywords: Kwargs| {
        let mut args = Args::of("float", &args, keywords);
        let default = args.next("default")?.unwrap_or(Value::from(0.0));
        args.end()?;
        Ok::<_, Error>(float_of(value).map_or(default, Value::from))
    });
    environment.add_filter("round", round);
    environment.add_filter("join", join);
    environment.add_filter("list", |state: &State, value: &Value| {
        let mut items = Vec::new();
        let mut add = |item| pay_items(state, 1).map(|()| items.push(item));
        match value.as_str() {
            Some(text) => text.chars().try_for_each(|c| add(Value::from(c.to_string())))?,
            None => value.try_iter()?.try_for_each(add)?,
        }
        Ok::<_, Error>(Value::from(items))
    });
    environment.add_filter("random", |state: &State, value: &Value| {
        let items: Vec<Value> = value.try_iter()?.collect();
        pay_items(state, items.len())?;
        let mut random = crate::data::Random::new(0);
        Ok::<_, Error>(match items.len() {
            0 => Value::UNDEFINED,
            len => items[random.below(len as u64) as usize].clone(),
        })
    });
    environment.add_filter("format", |state: &State, text: &str, args: Rest<Value>, keywords: Kwargs| {
        let names: Vec<String> = keywords.args().map(str::to_string).collect();
        let named = names.iter().map(|name| Ok((name.clone(), keywords.get::<Value>(name)?)));
        let values = if names.is_empty() {
            Value::from(minijinja::value::Tuple::from(args.to_vec()))
        } else {
            Value::from_pairs(named.collect::<Result<Vec<_>, Error>>()?)
        };
        percent(state, text, &values)
    });
    environment.add_filter("pprint", |state: &State, value: &Value| {
        let text = repr(value)?;
        pay_bytes(state, text.len())?;
        Ok::<_, Error>(text)
    });
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("xmlattr", xmlattr);
    environment.add_filter(PERCENT, remainder);
    environment.add_filter(PRINTED, |value: &Value| match value.as_str() {
        Some(_) => Ok(value.clone()),
        None => str_of(value).map(Value::from),
    });
}

/// `left % right` of text or numbers.
fn remainder(state: &State, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return percent(state, text, right).map(Value::from);
    }
    let refused = || invalid(format!("`%` of {} and {}", left.kind(), right.kind()));
    let integer = |value: &Value| match value.kind() {
        ValueKind::Number if !value.is_integer() => None,
        _ => i64::try_from(value.clone()).ok(),
    };
    if let (Some(left), Some(right)) = (integer(left), integer(right).filter(|right| *right != 0)) {
        let remainder = left.wrapping_rem(right);
        let has_other_sign = remainder != 0 && (remainder < 0) != (right < 0);
        return Ok(Value::from(if has_other_sign { remainder + right } else { remainder }));
    }
    let number = |value: &Value| float_of(value).filter(|_| value.as_str().is_none()).ok_or_else(refused);
    let (left, right) = (number(left)?, number(right)?);
    if right == 0.0 {
        return Err(invalid("`%` by zero"));
    }
    let remainder = left % right;
    Ok(Value::from(match remainder {
        0.0 => 0.0_f64.copysign(right),
        remainder if (remainder < 0.0) != (right < 0.0) => remainder + right,
        remainder => remainder,
    }))
}

type TextFilter = fn(&State, &str, &mut Args) -> Result<String, Error>;

fn add_tests(environment: &mut Environment<'static>) {
    use ValueKind::{Bool, Bytes, Iterable, Map, Number, Plain, Seq, String, Undefined};
    environment.add_test("iterable", |value: &Value| {
        matches!(value.kind(), String | Bytes | Seq | Iterable | Map | Undefined) && !is_namespace(value)
    });
    environment.add_test("sequence", |value: &Value| match value.kind() {
        String | Bytes | Seq | Map | Undefined => !is_namespace(value),
        // the engine's lazy lists know their length, generators do not
        Iterable => value.len().is_some(),
        _ => false,
    });
    environment.add_test("mapping", |value: &Value| value.kind() == Map && !is_namespace(value));
    environment.add_test("callable", |value: &Value| matches!(value.kind(), Plain | Undefined));
    environment.add_test("number", |value: &Value| matches!(value.kind(), Number | Bool));
}

fn force_escape(state: &State, value: &Value) -> Result<Value, Error> {
    let text = str_of(value)?;
    pay_bytes(state, text.len() * 5)?;
    Ok(Value::from_safe_string(escaped(&text)))
}

/// Escapes the five HTML characters like `markupsafe`.
/// `a + b`; if one of them is safe, the other is escaped, like Markup.
fn plus(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    let (Some(left), Some(right)) = (a.as_str(), b.as_str()) else {
        return state.env().compile_expression("a + b")?.eval(minijinja::context! { a, b });
    };
    pay_bytes(state, left.len() + right.len())?;
    let part = |value: &Value, text: &str| if value.is_safe() { text.to_string() } else { escaped(text) };
    Ok(if a.is_safe() || b.is_safe() {
        Value::from_safe_string(part(a, left) + &part(b, right))
    } else {
        Value::from(left.to_string() + right)
    })
}

pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

fn titled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_start = true;
    for c in text.chars() {
        if is_start {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
        is_start = is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn replace(state: &State, text: &str, args: &mut Args) -> Result<String, Error> {
    let (old, new) = (str_of(&args.required("old")?)?, str_of(&args.required("new")?)?);
    let count =
        args.optional_integer("count")?.map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(usize::MAX));
    let found = text.matches(old.as_str()).count().min(count);
    pay_bytes(state, found.saturating_mul(new.len()))?;
    Ok(if count == usize::MAX { text.replace(&old, &new) } else { text.replacen(&old, &new, count) })
}

fn truncate(_: &State, text: &str, args: &mut Args) -> Result<String, Error> {
    let length = usize::try_from(args.integer("length", 255)?).unwrap_or(0);
    let kills_words = args.flag("killwords", false)?;
    let end = args.optional_text("end")?.unwrap_or("...".into());
    let leeway = usize::try_from(args.integer("leeway", 5)?).unwrap_or(0);
    let end_length = end.chars().count();
    if length < end_length {
        return Err(args.wrong(&format!("expected a length of at least {end_length}, found {length}")));
    }
    if text.chars().count() <= length + leeway {
        return Ok(text.to_string());
    }
    let cut: String = text.chars().take(length - end_length).collect();
    let cut = if kills_words { cut.as_str() } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before) };
    Ok(format!("{cut}{end}"))
}

fn indent(state: &State, text: &str, args: &mut Args) -> Result<String, Error> {
    let indention = match args.next("width")? {
        Some(width) if width.as_str().is_some() => width.as_str().unwrap_or_default().to_string(),
        width => {
            let width =
                width.map_or(Ok(4), |width| i64::try_from(width).map_err(|_| args.wrong("expected a width")))?;
            let width = usize::try_from(width).unwrap_or(0);
            pay_bytes(state, width)?;
            " ".repeat(width)
        }
    };
    let (with_first, with_blank) = (args.flag("first", false)?, args.flag("blank", false)?);
    pay_bytes(state, text.lines().count().saturating_mul(indention.len()))?;
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let is_indented = if index == 0 { with_first } else { with_blank || !line.is_empty() };
        if is_indented {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `textwrap.wrap` of each line, without splitting at hyphens inside numbers.
fn wordwrap(state: &State, text: &str, args: &mut Args) -> Result<String, Error> {
    let width = usize::try_from(args.integer("width", 79)?).unwrap_or(0);
    let breaks_long = args.flag("break_long_words", true)?;
    let end = args.optional_text("wrapstring")?.unwrap_or("\n".into());
    if width == 0 {
        return Err(args.wrong("expected a width above 0"));
    }
    if args.flag("break_on_hyphens", true)? && text.contains('-') && text.contains(|c: char| !c.is_ascii()) {
        return Err(args.wrong("text with hyphens and characters beyond ASCII is not supported"));
    }
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let mut current = String::new();
        let mut len = 0;
        for chunk in chunks(line) {
            let mut chunk: Vec<char> = chunk.chars().collect();
            pay_items(state, chunk.len())?;
            if len + chunk.len() > width && len > 0 && (!breaks_long || chunk.len() <= width) {
                lines.push(current.trim_end().to_string());
                (current, len) = (String::new(), 0);
                if chunk.iter().all(|&c| is_space(c)) {
                    continue;
                }
            }
            while breaks_long && len + chunk.len() > width {
                let rest = chunk.split_off((width - len).min(chunk.len()));
                current.extend(chunk);
                lines.push(std::mem::take(&mut current));
                (chunk, len) = (rest, 0);
            }
            len += chunk.len();
            current.extend(chunk);
        }
        lines.push(current.trim_end().to_string());
    }
    Ok(lines.join(&end))
}

/// Splits a line into words and spaces; a word also ends after a hyphen between letters.
fn chunks(line: &str) -> Vec<String> {
    let chars: Vec<char> = line.chars().collect();
    let mut chunks: Vec<String> = Vec::new();
    for (index, &c) in chars.iter().enumerate() {
        let letter = |at: usize| chars.get(at).is_some_and(|c| c.is_alphabetic());
        let begins = index == 0
            || is_space(c) != is_space(chars[index - 1])
            || (chars[index - 1] == '-' && index > 1 && letter(index - 2) && letter(index));
        if begins {
            chunks.push(String::new());
        }
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(c);
        }
    }
    chunks
}

fn strip_tags(text: &str) -> String {
    let mut out = text.to_string();
    while let Some(start) = out.find("<!--") {
        let Some(end) = out[start..].find("-->") else { break };
        out.replace_range(start..start + end + 3, "");
    }
    let mut plain = String::with_capacity(out.len());
    let mut rest = out.as_str();
    while let Some(start) = rest.find('<') {
        let Some(end) = rest[start..].find('>') else { break };
        plain.push_str(&rest[..start]);
        rest = &rest[start + end + 1..];
    }
    plain.push_str(rest);
    let joined: Vec<&str> = plain.split(is_space).filter(|word| !word.is_empty()).collect();
    let joined = joined.join(" ");
    let entities = [("&lt;", "<"), ("&gt;", ">"), ("&#34;", "\""), ("&quot;", "\""), ("&#39;", "'"), ("&amp;", "&")];
    entities.iter().fold(joined, |text, (entity, c)| text.replace(entity, c))
}

fn file_size(bytes: f64, is_binary: bool) -> String {
    let base = if is_binary { 1024.0 } else { 1000.0 };
    let prefixes = if is_binary {
        ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]
    } else {
        ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]
    };
    if (bytes - 1.0).abs() < f64::EPSILON {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let mut unit = base;
    for prefix in prefixes {
        unit *= base;
        if bytes < unit {
            return format!("{:.1} {prefix}", base * bytes / unit);
        }
    }
    format!("{:.1} {}", base * bytes / unit, prefixes[7])
}

fn float_of(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => {
            let plain = text.trim_matches(is_space).replace('_', "");
            plain.parse().ok()
        }
        None if matches!(value.kind(), ValueKind::Number) => f64::try_from(value.clone()).ok(),
        None if value.kind() == ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        None => None,
    }
}

fn to_int(value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut args = Args::of("int", &args, keywords);
    let default = args.next("default")?.unwrap_or(Value::from(0));
    let base = args.integer("base", 10)?;
    args.end()?;
    if value.is_integer() {
        return Ok(value.clone());
    }
    if let Some(integer) = value.as_str().and_then(|text| integer_of(text, base)) {
        return Ok(Value::from(integer));
    }
    let float = float_of(value).filter(|float| float.is_finite() && float.abs() < 1e38);
    Ok(float.map_or(default, |float| {
        let integer = float as i128;
        i64::try_from(integer).map_or_else(|_| Value::from(integer), Value::from)
    }))
}

/// `int(text, base)`.
fn integer_of(text: &str, base: i64) -> Option<i64> {
    let text = text.trim_matches(is_space);
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(prefix, _)| lower.starts_with(prefix));
    let (digits, base) = match prefixed {
        Some((_, radix)) if base == radix || base == 0 => (&lower[2..], radix),
        _ if base == 0 => (lower.as_str(), 10),
        _ => (lower.as_str(), base),
    };
    if !(2..=36).contains(&base)
        || digits.starts_with(['+', '-', '_'])
        || digits.ends_with('_')
        || digits.contains("__")
    {
        return None;
    }
    let integer = i64::from_str_radix(&digits.replace('_', ""), base as u32).ok()?;
    Some(if is_negative { -integer } else { integer })
}

fn round(value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut args = Args::of("round", &args, keywords);
    let precision = args.integer("precision", 0)?.clamp(-300, 300) as i32;
    let method = args.optional_text("method")?.unwrap_or("common".into());
    let float = f64::try_from(value.clone()).map_err(|_| args.wrong("expected a number"))?;
    args.end()?;
    let scale = 10_f64.powi(precision);
    match method.as_str() {
        "ceil" => Ok(Value::from((float * scale).ceil() / scale)),
        "floor" => Ok(Value::from((float * scale).floor() / scale)),
        "common" if value.is_integer() && precision >= 0 => Ok(value.clone()),
        "common" if precision < 0 => {
            let rounded = (float * scale).round_ties_even() / scale;
            Ok(if value.is_integer() { Value::from(rounded as i64) } else { Value::from(rounded) })
        }
        // the decimal text is rounded exactly, half to even as Python does
        "common" => {
            let precision = precision as usize;
            Ok(Value::from(format!("{float:.precision$}").parse::<f64>().unwrap_or(float)))
        }
        other => Err(invalid(format!("`round`: expected `common`, `ceil` or `floor`, found `{other}`"))),
    }
}

fn join(state: &State, value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut args = Args::of("join", &args, keywords);
    let separator = args.next("d")?.map_or(Ok(String::new()), |separator| str_of(&separator))?;
    let attribute = args.next("attribute")?.filter(|attribute| !attribute.is_none());
    args.end()?;
    let mut out = String::new();
    let mut add = |index: usize, text: &str| {
        state.consume_fuel(1 + (text.len() + separator.len()) as u64 / 64)?;
        if index > 0 {
            out.push_str(&separator);
        }
        out.push_str(text);
        Ok::<_, Error>(())
    };
    if let Some(text) = value.as_str() {
        let mut buffer = [0; 4];
        text.chars().enumerate().try_for_each(|(index, c)| add(index, c.encode_utf8(&mut buffer)))?;
        return Ok(Value::from(out));
    }
    for (index, item) in value.try_iter()?.enumerate() {
        let item = match &attribute {
            Some(attribute) => at_path(item, attribute)?,
            None => item,
        };
        match item.as_str() {
            Some(text) => add(index, text)?,
            None => add(index, &str_of(&item)?)?,
        }
    }
    Ok(Value::from(out))
}

/// The item at a path such as `a.b.0`.
fn at_path(item: Value, path: &Value) -> Result<Value, Error> {
    let Some(path) = path.as_str() else { return item.get_item(path) };
    path.split('.').try_fold(item, |item, key| match key.parse::<usize>() {
        Ok(index) => item.get_item(&Value::from(index)),
        Err(_) => item.get_attr(key),
    })
}

/// `urllib.parse.quote`; `/` is unquoted outside of queries only.
fn quoted(text: &str, is_query: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(char::from(byte)),
            b'/' if !is_query => out.push('/'),
            b' ' if is_query => out.push('+'),
            // writing to a string cannot fail
            byte => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

fn urlencode(state: &State, value: &Value) -> Result<String, Error> {
    let pair =
        |key: &Value, value: &Value| Ok::<_, Error>(quoted(&str_of(key)?, true) + "=" + &quoted(&str_of(value)?, true));
    let text = match value.kind() {
        ValueKind::Map => {
            let pairs: Result<Vec<String>, Error> =
                value.try_iter()?.map(|key| pair(&key, &value.get_item(&key)?)).collect();
            pairs?.join("&")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let item = |item: Value| pair(&item.get_item(&Value::from(0))?, &item.get_item(&Value::from(1))?);
            value.try_iter()?.map(item).collect::<Result<Vec<_>, _>>()?.join("&")
        }
        ValueKind::Number => quoted(&number(value, "nan", "inf"), false),
        _ => quoted(&str_of(value)?, false),
    };
    pay_bytes(state, text.len())?;
    Ok(text)
}

fn xmlattr(state: &State, value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut args = Args::of("xmlattr", &args, keywords);
    let has_space = args.flag("autospace", true)?;
    let mut items = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        if item.is_none() || item.is_undefined() {
            continue;
        }
        let key = str_of(&key)?;
        if key.contains(|c: char| is_space(c) || matches!(c, '/' | '>' | '=')) {
            return Err(args.wrong("a key contains a space, `/`, `>` or `=`"));
        }
        items.push(format!("{}=\"{}\"", escaped(&key), escaped(&str_of(&item)?)));
    }
    args.end()?;
    let text = items.join(" ");
    pay_bytes(state, text.len())?;
    Ok(Value::from(if has_space && !text.is_empty() { format!(" {text}") } else { text }))
}

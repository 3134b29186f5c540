//! Formats times like Python's `strftime`.

use super::python::invalid;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use minijinja::Error;
use std::time::SystemTime;

/// `datetime.strftime(format)` in a time zone, in English.
pub(super) fn strftime(format: &str, time: SystemTime, zone: TimeZone) -> Result<String, Error> {
    let timestamp = Timestamp::try_from(time).map_err(|e| invalid(format!("`strftime_now`: {e}")))?;
    let zoned = timestamp.to_zoned(zone);
    let format = directives(format);
    jiff::fmt::strtime::format(&format, &zoned).map_err(|e| invalid(format!("`strftime_now`: {e}")))
}

/// Expands the directives that depend on the locale or that Python changes.
fn directives(format: &str) -> String {
    let mut text = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut flags = String::new();
        let mut code = chars.next();
        while let Some(flag) = code.filter(|c| matches!(c, '-' | '_' | '0' | '^' | '#')) {
            flags.push(flag);
            code = chars.next();
        }
        match code {
            Some('c') => text.push_str("%a %b %e %H:%M:%S %Y"),
            Some('x') => text.push_str("%m/%d/%y"),
            Some('X') => text.push_str("%H:%M:%S"),
            Some('r') => text.push_str("%I:%M:%S %p"),
            Some('f') => text.push_str("%6f"),
            // `datetime.now()` has no zone, so Python writes nothing for these
            Some('z' | 'Z') => {}
            Some(code) if "aAbBhCdDeFgGHIjklmMnpPRsStTuUVwWyY%".contains(code) => {
                text.push('%');
                text.push_str(&flags);
                text.push(code);
            }
            // the C library copies unknown directives
            code => {
                text.push_str("%%");
                text.push_str(&flags);
                text.extend(code);
            }
        }
    }
    text
}

/// `datetime.now().strftime(format)` in the local time zone.
pub(in crate::data) fn strftime_local(format: &str, time: SystemTime) -> Result<String, Error> {
    strftime(format, time, Zoned::now().time_zone().clone())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_right_across_leap_years() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let utc = |format: &str, seconds| strftime(format, at(seconds), TimeZone::UTC).unwrap();
        assert_eq!(utc("%F %T %a", 0), "1970-01-01 00:00:00 Thu");
        assert_eq!(utc("%d %b %Y", 1_709_164_800), "29 Feb 2024");
        assert_eq!(utc("%A %-d %B %y, day %j", 1_735_603_200), "Tuesday 31 December 24, day 366");
        assert_eq!(utc("%I:%M %p 100%%", 13 * 3600 + 300), "01:05 PM 100%");
        assert_eq!(utc("%c|%x|%X|%z%Z|%f|%e|%Q", 0), "Thu Jan  1 00:00:00 1970|01/01/70|00:00:00||000000| 1|%Q");
    }

    #[test]
    fn the_time_zone_changes_the_date() {
        let zone = TimeZone::fixed(jiff::tz::offset(9));
        let time = SystemTime::UNIX_EPOCH + Duration::from_hours(482_128);
        assert_eq!(strftime("%d %b %Y %H:%M", time, zone).unwrap(), "01 Jan 2025 01:00");
    }
}

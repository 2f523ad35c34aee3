//! Dates as older chats write them.

use serde_json::Value;

/// Numbers below this are seconds, above it milliseconds: the year 5138 in the one, 1973 in the other.
const SECONDS_BELOW: u64 = 100_000_000_000;
/// Numbers below this are milliseconds, above it microseconds.
const MILLIS_BELOW: u64 = 1_000 * SECONDS_BELOW;
/// Numbers above this are no date.
const MICROS_BELOW: u64 = 1_000 * MILLIS_BELOW;

/// A time as JavaScript and others write it, in milliseconds since 1970: a number of seconds, milliseconds or
/// microseconds, or `2024-12-05T10:20:30.123Z`. `None` for what is no time.
pub(super) fn time_ms(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => {
            let number = number.as_u64().or_else(|| number.as_f64().filter(|n| *n > 0.0).map(|n| n as u64))?;
            match number {
                0..SECONDS_BELOW => Some(number * 1000),
                SECONDS_BELOW..MILLIS_BELOW => Some(number),
                MILLIS_BELOW..MICROS_BELOW => Some(number / 1000),
                _ => None,
            }
        }
        Value::String(text) => iso_ms(text).or_else(|| time_ms(&Value::from(text.parse::<u64>().ok()?))),
        _ => None,
    }
}

fn iso_ms(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = clock.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let millis: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    let ranges = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !ranges || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some((((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second) * 1000 + millis)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    let is_leap = leap_days(year) != leap_days(year - 1);
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let in_year = BEFORE_MONTH[month as usize - 1] + u64::from(is_leap && month > 2) + day - 1;
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969) + in_year
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Every unit and form is read; what is no date is none.
    #[test]
    fn times_are_read() {
        for (time, expected) in [
            (json!("1970-01-01T00:00:00Z"), Some(0)),
            (json!("2000-02-29T23:59:59.5Z"), Some(951_868_799_500)),
            (json!("2023-03-01T00:00:00.000Z"), Some(1_677_628_800_000)),
            (json!(1_700_000_000), Some(1_700_000_000_000)),
            (json!(1_700_000_000_123_u64), Some(1_700_000_000_123)),
            (json!(1_700_000_000_123_456_u64), Some(1_700_000_000_123)),
            (json!(1_700_000_000.5), Some(1_700_000_000_000)),
            (json!(u64::MAX), None),
            (json!(1e300), None),
            (json!("1700000000"), Some(1_700_000_000_000)),
            (json!("yesterday"), None),
            (json!("2023-13-01T00:00:00Z"), None),
            (json!(-5), None),
            (json!(null), None),
        ] {
            assert_eq!(time_ms(&time), expected, "{time}");
        }
    }
}

//! Moments on the command line: `--since 7d`, `--until 2026-01-31`. Pure; what time it is comes from the caller.

use std::str::FromStr;

/// A moment as the user wrote it: fixed, or before now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Seconds since 1970 UTC.
    At(u64),
    /// Seconds before now.
    Ago(u64),
}

/// The text is no moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is no time; write unix seconds, a date such as 2026-01-31 or 2026-01-31T12:00:00Z (UTC), or 7d, 12h, 30m ago")]
pub struct TimeError;

impl When {
    /// Seconds since 1970 UTC, given what time it is now in the same measure. Before 1970 is 1970.
    pub fn resolve(self, now: u64) -> u64 {
        match self {
            When::At(secs) => secs,
            When::Ago(secs) => now.saturating_sub(secs),
        }
    }
}

impl FromStr for When {
    type Err = TimeError;

    /// Reads unix seconds; `90s`, `30m`, `12h`, `7d` or `2w` for so long ago; or an RFC 3339 date with or without a time
    /// of day (no offset means UTC, a date alone its first second).
    fn from_str(text: &str) -> Result<When, TimeError> {
        if let Some(secs) = parse_digits(text) {
            return Ok(When::At(secs));
        }
        if let Some(secs) = parse_span(text) {
            return Ok(When::Ago(secs));
        }
        parse_date_time(text).map(When::At).ok_or(TimeError)
    }
}

/// Like `parse`, but without the sign that it lets pass.
fn parse_digits(text: &str) -> Option<u64> {
    let digits_only = text.bytes().all(|byte| byte.is_ascii_digit());
    if digits_only { text.parse().ok() } else { None }
}

fn parse_span(text: &str) -> Option<u64> {
    let unit_at = text.char_indices().next_back()?.0;
    let unit_secs = match &text[unit_at..] {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        "w" => 7 * 24 * 60 * 60,
        _ => return None,
    };
    parse_digits(&text[..unit_at])?.checked_mul(unit_secs)
}

fn parse_date_time(text: &str) -> Option<u64> {
    let (date, rest) = text.split_at_checked("2026-01-31".len())?;
    let days = parse_date(date)?;
    let secs = days * 24 * 60 * 60;
    let Some(rest) = rest.strip_prefix(['T', 't', ' ']) else {
        return rest.is_empty().then_some(secs)?.try_into().ok();
    };
    let (time, offset_secs) = split_offset(rest)?;
    (secs + parse_time_of_day(time)? - offset_secs).try_into().ok()
}

/// Days since 1970-01-01.
fn parse_date(text: &str) -> Option<i64> {
    let [year, month, day] = numbers(text, '-', [4, 2, 2])?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let month_days = match month {
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        1..=12 => 31,
        _ => return None,
    };
    ((1..=month_days).contains(&day)).then(|| days_since_1970(year, month, day))
}

/// Counts with years that begin in March, so that the leap day is a year's last and months follow a line of 153 days
/// for each five.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let days_from_march_year_0 = 365 * year + leap_days + (153 * month + 2) / 5 + day - 1;
    days_from_march_year_0 - DAYS_FROM_MARCH_YEAR_0_TO_1970
}

/// From 0000-03-01 to 1970-01-01.
const DAYS_FROM_MARCH_YEAR_0_TO_1970: i64 = 719_468;

/// The time of day, and how many seconds its zone is ahead of UTC.
fn split_offset(text: &str) -> Option<(&str, i64)> {
    if let Some(time) = text.strip_suffix(['Z', 'z']) {
        return Some((time, 0));
    }
    let Some(sign_at) = text.rfind(['+', '-']) else {
        return Some((text, 0));
    };
    let [hours, minutes] = numbers(&text[sign_at + 1..], ':', [2, 2])?;
    if hours > 23 || minutes > 59 {
        return None;
    }
    let ahead_secs = (hours * 60 + minutes) * 60;
    Some((&text[..sign_at], if text[sign_at..].starts_with('-') { -ahead_secs } else { ahead_secs }))
}

/// Seconds since midnight. A fraction is dropped, since events are dated in whole seconds; a leap second counts as the
/// next minute's first, as unix time has it.
fn parse_time_of_day(text: &str) -> Option<i64> {
    let (time, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.is_empty() || parse_digits(fraction).is_none() {
        return None;
    }
    let [hour, minute, second] = match numbers(time, ':', [2, 2]) {
        Some([hour, minute]) if time == text => [hour, minute, 0],
        _ => numbers(time, ':', [2, 2, 2])?,
    };
    (hour < 24 && minute < 60 && second <= 60).then_some((hour * 60 + minute) * 60 + second)
}

/// Exactly `N` numbers of these many digits.
fn numbers<const N: usize>(text: &str, separator: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut values = [0; N];
    let mut parts = text.split(separator);
    for (value, digits) in values.iter_mut().zip(digits) {
        let part = parts.next()?;
        if part.len() != digits {
            return None;
        }
        *value = parse_digits(part)?.try_into().ok()?;
    }
    parts.next().is_none().then_some(values)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Expected seconds from `date -u -d TEXT +%s`.
    #[test]
    fn moments_are_read_in_each_of_their_spellings() {
        for (text, expected) in [
            ("0", When::At(0)),
            ("1700000000", When::At(1_700_000_000)),
            ("18446744073709551615", When::At(u64::MAX)),
            ("90s", When::Ago(90)),
            ("30m", When::Ago(1_800)),
            ("12h", When::Ago(43_200)),
            ("7d", When::Ago(604_800)),
            ("2w", When::Ago(1_209_600)),
            ("1970-01-01", When::At(0)),
            ("2000-02-29", When::At(951_782_400)),
            ("2024-12-31", When::At(1_735_603_200)),
            ("2100-03-01", When::At(4_107_542_400)),
            ("2023-11-14T22:13:20Z", When::At(1_700_000_000)),
            ("2023-11-14 22:13:20", When::At(1_700_000_000)),
            ("2023-11-14T22:13", When::At(1_699_999_980)),
            ("2023-11-14t23:13:20.999+01:00", When::At(1_700_000_000)),
            ("2023-11-14T16:43:20-05:30", When::At(1_700_000_000)),
            ("2016-12-31T23:59:60Z", When::At(1_483_228_800)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    /// Nothing is guessed.
    #[test]
    fn what_is_no_moment_is_refused() {
        for text in [
            "",
            "d",
            "-1",
            "+1",
            "1.5",
            "1e3",
            "7 d",
            "7y",
            "é",
            "7é",
            "yesterday",
            "18446744073709551616",
            "99999999999999999999d",
            "18446744073709551615w",
            "2023-02-29",
            "1900-02-29",
            "2023-13-01",
            "2023-00-01",
            "2023-01-00",
            "2023-04-31",
            "2023-1-1",
            "20230101T",
            "2023-01-01T",
            "2023-01-01X",
            "2023-01-01T24:00",
            "2023-01-01T12",
            "2023-01-01T12:60",
            "2023-01-01T12:00:61",
            "2023-01-01T12:00.5",
            "2023-01-01T12:00:00.",
            "2023-01-01T12:00:00+1:00",
            "2023-01-01T12:00:00+24:00",
            "2023-01-01T12:00:00ZZ",
            "1969-12-31",
            "2023-01-é1",
        ] {
            assert_eq!(text.parse::<When>(), Err(TimeError), "{text}");
        }
    }

    /// Longer ago than 1970 is all there is.
    #[test]
    fn a_span_counts_back_from_now() {
        assert_eq!(When::Ago(60).resolve(1_000), 940);
        assert_eq!(When::Ago(60).resolve(10), 0);
        assert_eq!(When::At(5).resolve(1_000), 5);
    }

    /// Day numbers rise by one from each day to the next, over the leap rules of four centuries.
    #[test]
    fn every_day_follows_the_one_before() {
        let mut expected = 0;
        for year in 1970..2401 {
            for month in 1..=12 {
                for day in 1..=31 {
                    let Some(found) = parse_date(&format!("{year:04}-{month:02}-{day:02}")) else {
                        assert!(day > 28);
                        continue;
                    };
                    assert_eq!(found, expected, "{year}-{month}-{day}");
                    expected += 1;
                }
            }
        }
    }
}

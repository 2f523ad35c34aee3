//! Progress bars and figures as people read them. The bars draw on standard error, and not at all where that is no
//! terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

/// A bar that counts bytes, vanishing when it is dropped. `None`: nobody knows yet how many there will be.
pub fn bytes(what: &'static str, total: Option<u64>) -> ProgressBar {
    let template = match total {
        Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
        None => "{msg} {spinner} {bytes}, {bytes_per_sec}",
    };
    bar(what, total, template)
}

/// A bar that counts events, vanishing when it is dropped.
pub fn events(what: &'static str, total: Option<u64>) -> ProgressBar {
    let template = match total {
        Some(_) => "{msg} [{bar:30}] {human_pos}/{human_len}, {eta} left",
        None => "{msg} {spinner} {human_pos}",
    };
    bar(what, total, template)
}

/// Moves a bar of bytes whose total is told along.
pub fn step(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}

fn bar(what: &'static str, total: Option<u64>, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("a test draws every template");
    ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(what)
        .with_finish(ProgressFinish::AndClear)
}

/// `1234567` as `1,234,567`.
pub fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes with the unit that suits them, in tenths: `12.3 MiB`.
pub fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let Some(step) = (1..=units.len()).rev().find(|step| bytes >> (10 * step) > 0) else {
        return format!("{bytes} B");
    };
    format!("{:.1} {}", bytes as f64 / (1_u64 << (10 * step)) as f64, units[step - 1])
}

/// `1 event`, `2 events`.
pub fn count_of_events(count: u64) -> String {
    let noun = if count == 1 { "event" } else { "events" };
    format!("{} {noun}", number(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each template is one that indicatif understands.
    #[test]
    fn every_bar_can_be_drawn() {
        for total in [None, Some(10)] {
            for bar in [bytes("bytes", total), events("events", total)] {
                bar.set_position(3);
                bar.tick();
            }
        }
    }

    /// Groups of three, and the unit in which a size has one to four digits.
    #[test]
    fn figures_are_readable() {
        let numbers = [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")];
        numbers.into_iter().for_each(|(value, expected)| assert_eq!(number(value), expected));
        for (bytes, expected) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1_024, "1.0 KiB"),
            (12_900_000, "12.3 MiB"),
            (3 << 30, "3.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
        assert_eq!([1, 2].map(count_of_events), ["1 event", "2 events"]);
    }
}

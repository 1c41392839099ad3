//! Sizes, times and names as users write them.

use std::time::Duration;

use kvm_ops::Irqchip;

/// The names of irqchips.
pub(crate) const IRQCHIPS: [(&str, Irqchip); 3] = [
    ("none", Irqchip::None),
    ("full", Irqchip::Full),
    ("split", Irqchip::Split),
];

/// Finds an irqchip by name.
pub(crate) fn irqchip(name: &str) -> Option<Irqchip> {
    IRQCHIPS
        .into_iter()
        .find_map(|(known, irqchip)| (known == name).then_some(irqchip))
}

/// Parses `4096`, `64K`, `16M`, `2G`, also `64KiB`; units are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => {
            return Err(format!(
                "`{text}` is not a size such as 4096, 64K, 16M or 2G"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size such as 4096, 64K, 16M or 2G"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("`{text}` does not fit in 64 bits"))
}

/// Parses a size of guest memory: whole pages, and at least one.
pub(crate) fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(check_memory)
}

/// The most memory of a VM, which `kvm_ops_machine` can describe to a guest.
const MOST_MEMORY: u64 = 1 << 40;

/// Checks that a size is whole pages, at least one, and at most 1 TiB.
pub(crate) fn check_memory(bytes: u64) -> Result<u64, String> {
    if bytes == 0 {
        return Err("a VM needs memory".into());
    }
    if !bytes.is_multiple_of(kvm_ops::PAGE_SIZE) {
        return Err(format!(
            "{bytes} bytes are not a multiple of the page size, {}",
            kvm_ops::PAGE_SIZE
        ));
    }
    if bytes > MOST_MEMORY {
        return Err(format!(
            "{bytes:#x} bytes are more than 1T, the most that a VM has"
        ));
    }
    Ok(bytes)
}

/// Formats how many millions were done in a second.
pub(crate) fn millions_in_a_second(count: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64().max(1e-9);
    format!("{:.1} M/s", count as f64 / 1e6 / seconds)
}

/// Formats a size in the largest unit that divides it.
pub(crate) fn size(bytes: u64) -> String {
    let unit = [(40, "T"), (30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((shift, name)) => format!("{}{name}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// Parses `500ms`, `10s`, `2m`, `1h 30m`.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text.trim())
        .map_err(|_| format!("`{text}` is not a time such as 500ms, 10s or 2m"))?;
    if time.is_zero() {
        return Err("a timeout of zero would run nothing".into());
    }
    Ok(time)
}

/// Formats a time with at most three digits.
pub(crate) fn time(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..=999 => format!("{us} us"),
        1_000..=9_999 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..=999_999 => format!("{} ms", us / 1000),
        1_000_000..=99_999_999 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{} s", us / 1_000_000),
    }
}

/// Formats a count with its noun, which gets an `s` unless the count is 1.
pub(crate) fn plural(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_and_read_back() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("16M", 16 << 20),
            ("16 MiB", 16 << 20),
            ("2g", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
            assert_eq!(parse_size(&size(bytes)), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "1X",
            "0x10",
            "16777216T",
            "99999999999999999999",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_is_whole_pages() {
        for text in ["0", "1", "4095", "4097", "5000"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
        assert_eq!(parse_memory("8K"), Ok(8192));
        assert_eq!(parse_memory("1T"), Ok(1 << 40));
        assert!(parse_memory("1073741828K").is_err());
    }

    #[test]
    fn times_need_a_unit_and_are_not_zero() {
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        for text in ["", "10", "0s", "-1s", "ten seconds"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}

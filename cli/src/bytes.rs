//! Bytes and numbers on the command line.

/// Bytes of the command line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<const N: usize>(pub(crate) [u8; N]);

/// Reads bytes in hex; zeros follow what is given.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Result<Bytes<N>, String> {
    let bytes = hex::decode(text).map_err(|error| error.to_string().to_lowercase())?;
    let mut padded = [0; N];
    padded
        .get_mut(..bytes.len())
        .ok_or_else(|| format!("{} bytes are more than {N}", bytes.len()))?
        .copy_from_slice(&bytes);
    Ok(Bytes(padded))
}

/// Reads so many bytes in hex.
pub(crate) fn parse_exact<const N: usize>(text: &str) -> Result<Bytes<N>, String> {
    if text.len() != 2 * N {
        return Err(format!(
            "{} digits are not the {} of {N} bytes",
            text.len(),
            2 * N
        ));
    }
    parse_hex(text)
}

/// Reads a number, in hex with 0x.
pub(crate) fn parse_number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| error.to_string())
}

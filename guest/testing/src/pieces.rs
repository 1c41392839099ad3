//! Accesses, page by page.

const PAGE: u64 = 0x1000;

/// The parts of an access in single pages. The last address ends it.
pub(crate) fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut at = gpa;
    let mut rest = len;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let in_page = (PAGE - at % PAGE) as usize;
        let piece = (at, rest.min(in_page));
        rest -= piece.1;
        // Beyond the last address is no address, which faults as it should.
        at = at.saturating_add(piece.1 as u64);
        Some(piece)
    })
}

//! Writing metadata lists: sequences of fields with consecutive codes, each under a header.

use super::place::{Context, Place};
use super::table::{Field, id};

/// Bytes of the list's own header: size in bytes, number of sequences, zeros.
const LIST_HEADER: usize = 8;
const WORD: usize = 8;
/// Fields a sequence's header can count.
const MAX_FIELDS: u64 = 512;

/// Value to write for an element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Element {
    Value(u64),
    /// Has its place in the list, which keeps the bytes it had.
    Unwritten,
    /// The field has no value and is left out.
    Absent,
}

/// The sequence being written.
#[derive(Clone, Copy)]
struct Sequence {
    /// Offset of its header, and the header's value for one field.
    at: usize,
    header: u64,
    fields: u64,
    /// Code a field must have to belong to it.
    next_code: u64,
}

struct Writer<'b> {
    list: &'b mut [u8],
    at: usize,
    sequences: u16,
    sequence: Option<Sequence>,
}

/// Writes the fields from `from` on in the order of identifiers, as far as whole ones fit. Returns the first
/// that does not, and leaves the rest of `list` as it is.
///
/// `mask` gives the bits of a field that are shown; a field without any is left out. `element` gives
/// values as they are stored.
pub(crate) fn write(
    context: Context,
    from: Place,
    list: &mut [u8],
    mask: impl Fn(&Field) -> u64,
    element: impl Fn(&Place) -> Element,
) -> Option<Place> {
    let mut writer = Writer {
        list,
        at: LIST_HEADER,
        sequences: 0,
        sequence: None,
    };
    let mut place = Some(from);
    while let Some(at) = place {
        let shown = mask(at.field());
        let next = next_field(context, &at, &mask);
        if shown == 0 {
            place = next;
            continue;
        }
        let values: Vec<Element> = elements(&at)
            .map(|p| match element(&p) {
                Element::Value(v) => Element::Value(v & at.field().element_mask() & shown),
                other => other,
            })
            .collect();
        if values.contains(&Element::Absent) {
            writer.sequence = None;
        } else if writer.field(&at, &values).is_none() {
            break;
        }
        place = next;
    }
    writer.finish();
    place
}

fn elements(first: &Place) -> impl Iterator<Item = Place> {
    let first = *first;
    (0..first.field().elements).map(move |i| Place {
        element: first.element + i,
        ..first
    })
}

fn next_field(context: Context, place: &Place, mask: impl Fn(&Field) -> u64) -> Option<Place> {
    let last = Place {
        element: place.element + place.field().elements - 1,
        ..*place
    };
    context.next(&last, mask)
}

impl Writer<'_> {
    /// Writes a field, with a header if it does not continue the sequence. `None` if it does not fit.
    fn field(&mut self, place: &Place, values: &[Element]) -> Option<()> {
        let field = place.field();
        let header = place.id() | u64::from(field.elements - 1) << id::LAST_ELEMENT_SHIFT;
        let step = u64::from(field.elements * place.table.stride());
        let next_code = (header & id::CODE) + step;
        let continued = self.sequence.filter(|s| {
            s.fields < MAX_FIELDS
                && place.cpuid().is_none()
                && s.next_code == header & id::CODE
                && same_kind(s.header, header)
        });
        let header_size = if continued.is_some() { 0 } else { WORD };
        let end = self.at + header_size + values.len() * WORD;
        if end > self.list.len() {
            return None;
        }
        let sequence = match continued {
            Some(s) => Sequence {
                fields: s.fields + 1,
                next_code,
                ..s
            },
            None => {
                self.sequences += 1;
                Sequence {
                    at: self.at,
                    header,
                    fields: 1,
                    next_code,
                }
            }
        };
        let count = (sequence.fields - 1) << id::LAST_FIELD_SHIFT;
        self.put(sequence.at, sequence.header | count);
        let first = self.at + header_size;
        for (i, value) in values.iter().enumerate() {
            if let Element::Value(value) = value {
                self.put(first + i * WORD, *value);
            }
        }
        self.at = end;
        self.sequence = Some(sequence);
        Some(())
    }

    fn put(&mut self, at: usize, word: u64) {
        if let Some(slot) = self.list.get_mut(at..at + WORD) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn finish(mut self) {
        self.put(0, self.at as u64 | u64::from(self.sequences) << 16);
    }
}

/// Two headers differ in nothing but code, and whether the field is architectural.
fn same_kind(a: u64, b: u64) -> bool {
    const NON_ARCHITECTURAL: u64 = 1 << 63;
    (a ^ b) & !(id::CODE | NON_ARCHITECTURAL) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::table::Agent;

    const SYS: Context = Context::Sys;

    fn all(list: &mut [u8], from: Place) -> Option<Place> {
        let mask = |f: &Field| f.read_mask(Agent::Host);
        write(SYS, from, list, mask, |_| Element::Value(u64::MAX))
    }

    fn word(list: &[u8], at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&list[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn consecutive_fields_share_a_header_and_values_are_cut_to_their_size() {
        let mut list = [0; 4096];
        let first = SYS.first(|_| 1).expect("a field");
        assert_eq!(all(&mut list, first), None);
        // The number of packages and the models of eight packages.
        assert_eq!(word(&list, 8), 0x0000_0202_0000_0000);
        assert_eq!(word(&list, 16), 0xFFFF_FFFF);
        assert_eq!(word(&list, 16 + 9 * 8), 0x0800_0042_0000_0000);
    }

    #[test]
    fn whole_fields_that_fit_are_written_and_the_first_that_does_not_is_returned() {
        let first = SYS.first(|_| 1).expect("a field");
        let mut whole = [0; 4096];
        all(&mut whole, first);
        let size = word(&whole, 0) as usize & 0xFFFF;
        for len in LIST_HEADER..size {
            let mut list = vec![0; len];
            let next = all(&mut list, first).expect("does not fit");
            let used = word(&list, 0) as usize & 0xFFFF;
            assert!(used <= len);
            // Going on there writes the rest.
            let mut rest = [0; 4096];
            assert_eq!(all(&mut rest, next), None);
            let rest_used = word(&rest, 0) as usize & 0xFFFF;
            assert!(used + rest_used >= size, "{len}");
        }
    }
}

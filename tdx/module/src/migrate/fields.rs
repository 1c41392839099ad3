//! Reading the metadata lists of an import against the fields that must and may come.

use super::bundle::{ListFailure, ListPage};
use crate::meta::place::{Context, Place};
use crate::meta::table::{Agent, Field, id, key_of};
use crate::status::{Code, Operand, Status};

/// Part of a TD's state that a bundle carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// State fixed by MNG.INIT and the build, and the exporter's SYS fields.
    Immutable,
    /// State that changes while the TD runs.
    Mutable,
}

/// Treatment of a field by an import.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Demand {
    Required,
    Optional,
    /// Not the bundle's: the importer sets it, or leaves it.
    Foreign,
}

impl Part {
    /// The bits of a field that an export of this part carries.
    pub(crate) fn exported_bits(self, field: &Field) -> u64 {
        let class = if self == Part::Immutable { "MB" } else { "ME" };
        match field.export == class {
            true => field.read_mask(Agent::Migration),
            false => 0,
        }
    }

    fn demand(self, field: &Field) -> Demand {
        match (self, field.import) {
            (Part::Immutable, "MB" | "CB") => Demand::Required,
            (Part::Immutable, "MBO" | "CBO") => Demand::Optional,
            (Part::Mutable, "ME" | "CE" | "IESME") => Demand::Required,
            (Part::Mutable, "MEO" | "CEO") => Demand::Optional,
            _ => Demand::Foreign,
        }
    }
}

/// Destination of the elements of a list.
pub(crate) trait Sink {
    /// Stores an element.
    ///
    /// # Errors
    /// The status of a write that is refused.
    fn store(&mut self, place: &Place, value: u64, mask: u64) -> Result<(), Status>;
}

/// The lists of one context, page after page.
pub(crate) struct Reader {
    part: Part,
    context: Context,
    /// The field to come; `None` behind the last.
    expected: Option<Place>,
    failure: Option<ListFailure>,
}

const HEADER: usize = 8;
/// In the detail: the list as a whole.
const WHOLE_LIST: u32 = 0xFFFF;

fn fails(status: Status, field: u64) -> ListFailure {
    ListFailure { status, field }
}

impl Reader {
    pub(crate) fn new(part: Part, context: Context) -> Self {
        Reader {
            part,
            context,
            expected: context.first(is_importable),
            failure: None,
        }
    }

    /// The first failure of all pages.
    pub(crate) fn failure(&self) -> Option<ListFailure> {
        self.failure
    }

    /// Takes a page; after a failure, none any more.
    pub(crate) fn take(&mut self, page: &ListPage, last: bool, sink: &mut impl Sink) {
        if self.failure.is_some() {
            return;
        }
        let result = self.list(page, sink).and_then(|()| self.finish(last));
        self.failure = result.err();
    }

    fn list(&mut self, page: &ListPage, sink: &mut impl Sink) -> Result<(), ListFailure> {
        let header = word(page, 0);
        let (size, sequences) = (usize::from(header as u16), (header >> 16) as u16);
        if size > page.len() {
            return Err(fails(Code::OPERAND_INVALID.on(Operand::PAGE), 0));
        }
        if sequences == 0 || header >> 32 != 0 {
            let status = Code::INVALID_METADATA_LIST_HEADER.detail(WHOLE_LIST);
            return Err(fails(status, 0));
        }
        let mut rest = page.get(HEADER..size).unwrap_or(&[]);
        for n in 0..u32::from(sequences) {
            rest = self.sequence(n, rest, sink)?;
        }
        Ok(())
    }

    /// Reads a sequence and returns what follows it.
    fn sequence<'a>(
        &mut self,
        n: u32,
        bytes: &'a [u8],
        sink: &mut impl Sink,
    ) -> Result<&'a [u8], ListFailure> {
        let of_header = WHOLE_LIST << 16 | n;
        if bytes.len() < 2 * HEADER {
            return Err(fails(Code::METADATA_LIST_OVERFLOW.detail(of_header), 0));
        }
        let header = word(bytes, 0);
        let wrong_id = |detail| fails(Code::METADATA_FIELD_ID_INCORRECT.detail(detail), header);
        if header & id::CONTEXT != self.context.adopt(header) & id::CONTEXT {
            return Err(wrong_id(of_header));
        }
        let mut place = self.seek(header)?.ok_or(wrong_id(of_header))?;
        let f = place.field();
        if header >> id::SIZE_SHIFT & 3 != f.id >> id::SIZE_SHIFT & 3 {
            return Err(wrong_id(n));
        }
        let elements = (header >> id::LAST_ELEMENT_SHIFT & 0xF) as usize + 1;
        let fields = (header >> id::LAST_FIELD_SHIFT & 0x1FF) as usize + 1;
        let class = key_of(header).0;
        let mut rest = &bytes[8..];
        let mut mask = u64::MAX;
        if header & WRITE_MASK_VALID != 0 {
            mask = word(rest, 0);
            rest = &rest[8..];
        }
        for left in (0..fields * elements).rev() {
            let (value, tail) = split(rest)
                .ok_or_else(|| fails(Code::METADATA_LIST_OVERFLOW.detail(of_header), 0))?;
            rest = tail;
            self.store(n, &place, value, mask, sink)?;
            let next = self.context.next(&place, every);
            self.expected = next;
            if left == 0 {
                break;
            }
            place = next
                .filter(|p| key_of(p.id()).0 == class)
                .ok_or(wrong_id(n))?;
        }
        Ok(rest)
    }

    /// The place of a sequence's first element. Optional fields before it may be missing.
    fn seek(&mut self, header: u64) -> Result<Option<Place>, ListFailure> {
        let Some(wanted) = self.context.find(header & !SEQUENCE_BITS) else {
            return Ok(None);
        };
        while let Some(place) = self.expected {
            if place == wanted {
                return Ok(Some(place));
            }
            if self.part.demand(place.field()) == Demand::Required {
                let status = Code::REQUIRED_METADATA_FIELD_MISSING.status();
                return Err(fails(status, place.id()));
            }
            self.expected = self.context.next(&place, every);
        }
        let status = Code::REQUIRED_METADATA_FIELD_MISSING.status();
        Err(fails(status, u64::MAX))
    }

    fn store(
        &self,
        n: u32,
        place: &Place,
        value: u64,
        mask: u64,
        sink: &mut impl Sink,
    ) -> Result<(), ListFailure> {
        if self.part.demand(place.field()) == Demand::Foreign {
            return Ok(());
        }
        match sink.store(place, value, mask) {
            Err(status) if status.code() != Code::METADATA_FIELD_NOT_WRITABLE => {
                Err(fails(status.code().detail(n), place.id()))
            }
            _ => Ok(()),
        }
    }

    /// After the last page nothing required may be left; before it, something must be.
    fn finish(&mut self, last: bool) -> Result<(), ListFailure> {
        let missing = Code::REQUIRED_METADATA_FIELD_MISSING.status();
        if !last {
            return match self.expected {
                Some(_) => Ok(()),
                None => Err(fails(missing, u64::MAX)),
            };
        }
        while let Some(place) = self.expected {
            if self.part.demand(place.field()) == Demand::Required {
                return Err(fails(missing, place.id()));
            }
            self.expected = self.context.next_row(&place, every);
        }
        Ok(())
    }
}

/// The header's counts and its mask flag.
const WRITE_MASK_VALID: u64 = 1 << 51;
const SEQUENCE_BITS: u64 =
    0xF << id::LAST_ELEMENT_SHIFT | 0x1FF << id::LAST_FIELD_SHIFT | WRITE_MASK_VALID;

fn is_importable(field: &Field) -> u64 {
    u64::from(field.import != "NONE")
}

/// Fields that no import stores have their place in the order, too.
fn every(_: &Field) -> u64 {
    1
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .rev()
        .fold(0, |w, b| w << 8 | u64::from(*b))
}

fn split(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, tail) = bytes.split_at_checked(8)?;
    Some((word(head, 0), tail))
}

//! Tables that point to one another, before it is known where they will lie.

/// Bytes in which tables start.
pub(super) const ALIGN: usize = 64;

/// The two pieces: the root pointer, and all other tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Root,
    Tables,
}

/// A change that the place of the tables makes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    /// The address of the tables is added to the number of `bytes` bytes there, which holds an offset.
    Pointer { piece: Piece, at: u32, bytes: u8 },
    /// The byte there, which holds 0, becomes the checksum of a range.
    Sum {
        piece: Piece,
        at: u32,
        start: u32,
        bytes: u32,
    },
}

/// A table's place behind the start of the tables.
pub(super) struct Placed {
    pub(super) at: u32,
    pub(super) bytes: u32,
}

/// The tables.
#[derive(Default)]
pub(super) struct Linked {
    pub(super) root: Vec<u8>,
    pub(super) tables: Vec<u8>,
    /// In the order in which they are to be done.
    pub(super) links: Vec<Link>,
}

impl Linked {
    /// Adds a table.
    pub(super) fn add(&mut self, table: &[u8]) -> Placed {
        self.tables
            .resize(self.tables.len().next_multiple_of(ALIGN), 0);
        let at = self.tables.len() as u32;
        self.tables.extend_from_slice(table);
        let bytes = table.len() as u32;
        Placed { at, bytes }
    }

    /// Notes a pointer to a table, which holds its offset.
    pub(super) fn point(&mut self, piece: Piece, at: u32, bytes: u8) {
        self.links.push(Link::Pointer { piece, at, bytes });
    }

    /// Leaves a checksum to be computed behind the pointers.
    pub(super) fn seal(&mut self, piece: Piece, at: u32, start: u32, bytes: u32) {
        self.piece(piece)[at as usize] = 0;
        self.links.push(Link::Sum {
            piece,
            at,
            start,
            bytes,
        });
    }

    fn piece(&mut self, piece: Piece) -> &mut Vec<u8> {
        match piece {
            Piece::Root => &mut self.root,
            Piece::Tables => &mut self.tables,
        }
    }

    /// Root pointer and tables as they are with the tables at an address.
    pub(super) fn at(mut self, address: u32) -> (Vec<u8>, Vec<u8>) {
        for link in std::mem::take(&mut self.links) {
            match link {
                Link::Pointer { piece, at, bytes } => {
                    let pointer = &mut self.piece(piece)[at as usize..][..bytes.into()];
                    let mut value = [0; 8];
                    value[..pointer.len()].copy_from_slice(pointer);
                    let value = u64::from_le_bytes(value) + u64::from(address);
                    pointer.copy_from_slice(&value.to_le_bytes()[..pointer.len()]);
                }
                Link::Sum {
                    piece,
                    at,
                    start,
                    bytes,
                } => {
                    let piece = self.piece(piece);
                    let range = &piece[start as usize..][..bytes as usize];
                    let sum = range.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                    piece[at as usize] = sum.wrapping_neg();
                }
            }
        }
        (self.root, self.tables)
    }
}

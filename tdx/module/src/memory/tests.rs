//! Memory against a model that keeps owner and plaintext of every line.

use super::{IntegrityFailure, KeyRing, LINE, PhysicalMemory};
use proptest::prelude::*;

const PAGES: usize = 2;
const SIZE: usize = PAGES * 4096;
const BASE: u64 = 0x7F_F000;

#[derive(Clone, Debug)]
enum Op {
    /// Owner 0 is the host, 1 and 2 are private keys.
    Write {
        owner: usize,
        at: usize,
        data: Vec<u8>,
    },
    Read {
        owner: usize,
        at: usize,
        len: usize,
    },
    Zero {
        owner: usize,
        page: usize,
    },
    /// A processor with private key 1 or 2 opens a page and writes a byte of it.
    Open {
        owner: usize,
        page: usize,
        at: usize,
        byte: u8,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let place = (0usize..3, 0..SIZE);
    let whole_lines =
        (0usize..3, 0..SIZE / LINE, 1usize..4, any::<u8>()).prop_map(|(owner, line, n, fill)| {
            let len = (n * LINE).min(SIZE - line * LINE);
            Op::Write {
                owner,
                at: line * LINE,
                data: vec![fill; len],
            }
        });
    prop_oneof![
        whole_lines,
        (
            place.clone(),
            proptest::collection::vec(any::<u8>(), 1..200)
        )
            .prop_map(|((owner, at), mut data)| {
                data.truncate(SIZE - at);
                Op::Write { owner, at, data }
            }),
        (place, 1usize..300).prop_map(|((owner, at), len)| Op::Read {
            owner,
            at,
            len: len.min(SIZE - at)
        }),
        (0usize..3, 0..PAGES).prop_map(|(owner, page)| Op::Zero { owner, page }),
        (1usize..3, 0..PAGES, 0usize..4096, any::<u8>()).prop_map(|(owner, page, at, byte)| {
            Op::Open {
                owner,
                page,
                at,
                byte,
            }
        }),
    ]
}

/// Owner and plaintext of each line; `None` once a host's partial write has mixed it with ciphertext.
#[derive(Clone)]
struct Model(Vec<(usize, Option<[u8; LINE]>)>);

impl Model {
    /// False if the write meets a line it may not read first.
    fn write(&mut self, owner: usize, at: usize, data: &[u8]) -> bool {
        let mut done = 0;
        while done < data.len() {
            let (line, within) = ((at + done) / LINE, (at + done) % LINE);
            let n = (LINE - within).min(data.len() - done);
            let (was, bytes) = &mut self.0[line];
            if n < LINE && *was != owner {
                if owner != 0 {
                    return false;
                }
                *bytes = None;
            }
            *was = owner;
            match bytes {
                Some(bytes) => bytes[within..within + n].copy_from_slice(&data[done..done + n]),
                None if n == LINE => {
                    let mut whole = [0; LINE];
                    whole.copy_from_slice(&data[done..done + n]);
                    *bytes = Some(whole);
                }
                None => {}
            }
            done += n;
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn owners_read_what_they_wrote_and_nobody_else_does(ops in proptest::collection::vec(op(), 1..60)) {
        let mem = PhysicalMemory::new(1 << 30, KeyRing::new(true, false, [3; 32]));
        let keys = [None, mem.keys.generate(), mem.keys.generate()];
        let mut model = Model(vec![(0, Some([0; LINE])); SIZE / LINE]);
        for op in ops {
            match op {
                Op::Write { owner, at, data } => {
                    let expected = model.write(owner, at, &data);
                    let key = keys[owner].as_deref();
                    let got = mem.private_write(BASE + at as u64, &data, key);
                    prop_assert_eq!(got.is_ok(), expected);
                }
                Op::Zero { owner, page } => {
                    let key = keys[owner].as_deref();
                    mem.zero_pages(BASE + (page * 4096) as u64, 1, key);
                    let lines = page * 4096 / LINE..(page + 1) * 4096 / LINE;
                    model.0[lines].fill((owner, Some([0; LINE])));
                }
                Op::Open { owner, page, at, byte } => {
                    let first = page * 4096;
                    let mine = |line: &(usize, _)| line.0 == owner;
                    let lines = &model.0[first / LINE..(first + 4096) / LINE];
                    let (good, mut expected) = (lines.iter().all(mine), Vec::new());
                    lines.iter().for_each(|(_, bytes)| expected.extend(bytes.unwrap_or([0; LINE])));
                    let open = mem.open(BASE + first as u64, keys[owner].as_ref());
                    prop_assert_eq!(open.is_ok(), good);
                    if let Ok(open) = open {
                        let mut bytes = [0; 4096];
                        open.read(0, &mut bytes);
                        prop_assert_eq!(&bytes[..], &expected[..]);
                        open.write(at, &[byte]);
                        prop_assert!(model.write(owner, first + at, &[byte]));
                    }
                }
                Op::Read { owner, at, len } => {
                    let mut buf = vec![0; len];
                    let key = keys[owner].as_deref();
                    let got = mem.private_read(BASE + at as u64, &mut buf, key);
                    let lines = &model.0[at / LINE..=(at + len - 1) / LINE];
                    if owner != 0 && lines.iter().any(|l| l.0 != owner) {
                        prop_assert_eq!(got, Err(IntegrityFailure));
                        continue;
                    }
                    prop_assert_eq!(got, Ok(()));
                    for (i, byte) in buf.iter().enumerate() {
                        let (line_owner, bytes) = &model.0[(at + i) / LINE];
                        if let (true, Some(bytes)) = (*line_owner == owner, bytes) {
                            prop_assert_eq!(*byte, bytes[(at + i) % LINE], "byte {}", i);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_view_of_a_page_is_the_same_open_or_closed(data in proptest::collection::vec(any::<u8>(), 4096)) {
        let mem = PhysicalMemory::new(1 << 30, KeyRing::new(true, false, [5; 32]));
        let key = mem.keys.generate();
        prop_assert_eq!(mem.private_write(0, &data, key.as_deref()), Ok(()));
        let view = |mem: &PhysicalMemory| {
            let mut views = [[0; 4096]; 3];
            mem.host_read(0, &mut views[0]);
            mem.peek(0, &mut views[1]);
            mem.private_read(0, &mut views[2], key.as_deref()).map(|()| views)
        };
        let closed = view(&mem);
        let open = mem.open(0, key.as_ref());
        prop_assert!(open.is_ok());
        prop_assert_eq!(&view(&mem), &closed);
        let turns = mem.keys.turns(key.as_ref());
        let counts = || {
            let turn = turns.share();
            (turn.closed(), turn.written())
        };
        prop_assert_eq!(counts(), (0, 0));
        // A write of the module is counted, and the frame stays.
        prop_assert_eq!(mem.private_write(128, &data[128..192], key.as_deref()), Ok(()));
        prop_assert_eq!(counts(), (0, 1));
        // A write of the host takes the frame back, and hurts its line alone.
        mem.host_write(64, &[0]);
        prop_assert_eq!(counts(), (1, 1));
        let mut line = [0; 64];
        prop_assert_eq!(mem.private_read(64, &mut line, key.as_deref()), Err(IntegrityFailure));
        prop_assert_eq!(mem.private_read(128, &mut line, key.as_deref()), Ok(()));
        prop_assert_eq!(&line[..], &data[128..192]);
        prop_assert_eq!(mem.open(0, key.as_ref()).err(), Some(IntegrityFailure));
        // A processor with a turn uses the other lines without waiting for one.
        let _turn = turns.share();
        let mine = key.as_deref();
        prop_assert_eq!(mem.private_try_read(64, &mut line, mine), Err(IntegrityFailure));
        prop_assert_eq!(mem.private_try_write(64, &[0], mine), Err(IntegrityFailure));
        prop_assert_eq!(mem.private_try_read(128, &mut line, mine), Ok(()));
        prop_assert_eq!(&line[..], &data[128..192]);
        // It may mend the line. Once another one has the page open, it asks again.
        prop_assert_eq!(mem.private_try_write(64, &line, mine), Ok(()));
        prop_assert!(mem.open(0, key.as_ref()).is_ok());
        prop_assert_eq!(mem.private_try_read(128, &mut line, mine), Err(IntegrityFailure));
        prop_assert_eq!(mem.private_try_write(128, &line, mine), Err(IntegrityFailure));
    }

    #[test]
    fn equal_plaintext_at_different_addresses_or_keys_looks_different(fill: u8) {
        let mem = PhysicalMemory::new(1 << 30, KeyRing::new(true, false, [4; 32]));
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..2 {
            let key = mem.keys.generate();
            prop_assert_eq!(mem.private_write(0, &[fill; 4096], key.as_deref()), Ok(()));
            let mut raw = [0; 4096];
            mem.host_read(0, &mut raw);
            prop_assert!(raw.chunks(16).all(|block| seen.insert(block.to_vec())));
        }
    }
}

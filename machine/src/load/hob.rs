//! The hand-off block list by which a TD's firmware learns of its memory (UEFI PI vol. 3, 4 and 5; TDVF design guide,
//! "TD Hand-Off Block").

/// Kinds of blocks.
const HAND_OFF: u16 = 1;
const RESOURCE: u16 = 3;
const END: u16 = 0xffff;
/// Bytes of the blocks.
const HEADER: usize = 8;
const HAND_OFF_BYTES: usize = 56;
const RESOURCE_BYTES: usize = 48;

const VERSION: u32 = 9;
/// Booting with all that there is.
const FULL_CONFIGURATION: u32 = 0;

/// Kinds of resources: memory that the TD has accepted already, and memory that it must accept.
const SYSTEM_MEMORY: u32 = 0;
const UNACCEPTED: u32 = 7;
/// Attributes: present, initialised, tested.
const USABLE: u32 = 0b111;

/// The list for address `at`. `ram` is the machine's memory, `accepted` what the TD starts with: starts and sizes, in the
/// order of their addresses. What is accepted outside of the RAM is left out.
pub(super) fn list(at: u64, ram: &[(u64, u64)], accepted: &[(u64, u64)]) -> Vec<u8> {
    let mut resources = Vec::new();
    for (start, bytes) in ram {
        let (mut next, end) = (*start, start + bytes);
        for (from, bytes) in accepted {
            let (from, to) = ((*from).max(next), (from + bytes).min(end));
            if from < to {
                resource(&mut resources, UNACCEPTED, next, from);
                resource(&mut resources, SYSTEM_MEMORY, from, to);
                next = to;
            }
        }
        resource(&mut resources, UNACCEPTED, next, end);
    }
    let mut list = Vec::new();
    header(&mut list, HAND_OFF, HAND_OFF_BYTES);
    list.extend(
        [VERSION, FULL_CONFIGURATION]
            .map(u32::to_le_bytes)
            .as_flattened(),
    );
    let end = at + (HAND_OFF_BYTES + resources.len() + HEADER) as u64;
    // Limits of memory, which firmware finds itself, and the end of the list.
    list.extend([0, 0, 0, 0, end].map(u64::to_le_bytes).as_flattened());
    list.extend(resources);
    header(&mut list, END, HEADER);
    list
}

fn header(to: &mut Vec<u8>, kind: u16, bytes: usize) {
    to.extend([kind, bytes as u16].map(u16::to_le_bytes).as_flattened());
    to.extend([0; 4]);
}

/// Adds a piece of memory, unless it is empty.
fn resource(to: &mut Vec<u8>, kind: u32, from: u64, end: u64) {
    if from >= end {
        return;
    }
    header(to, RESOURCE, RESOURCE_BYTES);
    // No owner.
    to.extend([0; 16]);
    to.extend([kind, USABLE].map(u32::to_le_bytes).as_flattened());
    to.extend([from, end - from].map(u64::to_le_bytes).as_flattened());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Kind, start and size of each resource.
    fn resources(list: &[u8]) -> Vec<(u8, u64, u64)> {
        let body = &list[HAND_OFF_BYTES..list.len() - HEADER];
        let resource = |piece: &[u8]| (piece[24], word(piece, 32), word(piece, 40));
        body.chunks(RESOURCE_BYTES).map(resource).collect()
    }

    #[test]
    fn all_memory_is_described_once_and_the_list_says_where_it_ends() {
        let ram = [(0, 0x10_0000), (0x1_0000_0000, 0x8000)];
        let list = list(
            0x9000,
            &ram,
            &[(0x1000, 0x2000), (0x9000, 0x2000), (0xff00_0000, 0x1000)],
        );
        assert_eq!(word(&list, 48), 0x9000 + list.len() as u64);
        assert_eq!(list[list.len() - HEADER..], [0xff, 0xff, 8, 0, 0, 0, 0, 0]);
        let expected = [
            (7, 0, 0x1000),
            (0, 0x1000, 0x2000),
            (7, 0x3000, 0x6000),
            (0, 0x9000, 0x2000),
            (7, 0xb000, 0xf_5000),
            (7, 0x1_0000_0000, 0x8000),
        ];
        assert_eq!(resources(&list), expected);
    }

    #[test]
    fn memory_that_is_accepted_whole_has_no_piece_to_accept() {
        let list = list(0, &[(0, 0x4000)], &[(0, 0x1000), (0x1000, 0x4000)]);
        assert_eq!(resources(&list), [(0, 0, 0x1000), (0, 0x1000, 0x3000)]);
    }
}

//! Images as trust domains. Firmware brings metadata (`tdvf`); an ELF program gets the pages that lead to its entry here.
//!
//! A TD's vCPU starts in 32-bit protected mode 16 bytes below 4 GiB (TDX module ABI, "TD VCPU initial state"). Pages of
//! ours lie there: code that switches to long mode, a descriptor table, page tables and a stack.

use kvm_ops::{PAGE_SIZE, SharedMask};

use super::super::launch::LaunchStep;
use super::super::layout::{FOUR_GIB, TD_STACK_TOP, TD_TABLES};
use super::super::start::{BOOT_CS, BOOT_DS, gdt};
use super::measured::{self, Contents};
use super::{Gpa, GuestRam, Image, MachineError};

/// The bytes below 4 GiB that a program's start takes: a stack for each vCPU, page tables, code.
pub(super) fn start_bytes(vcpus: u32) -> u64 {
    FOUR_GIB - TD_STACK_TOP.get() + u64::from(vcpus) * STACK
}

/// The stack of one vCPU, as a power of two.
const STACK_SHIFT: u8 = 14;
const STACK: u64 = 1 << STACK_SHIFT;

const RESET_PAGE: u64 = FOUR_GIB - PAGE_SIZE;
/// Offsets in the last page.
const GDT: usize = 0x800;
const GDT_POINTER: usize = 0x7f0;
const RESET: usize = 0xff0;

/// The measured start, in its order.
pub(crate) fn start(
    image: &Image,
    ram: &GuestRam,
    mask: SharedMask,
    vcpus: u32,
    #[cfg(feature = "tdx")] order: kvm_ops_tdvf::Order,
) -> Result<Vec<LaunchStep>, MachineError> {
    let format = measured::refuse_unused(image)?;
    match format {
        #[cfg(feature = "tdx")]
        super::ImageFormat::Firmware => super::tdvf::start(image, ram, order),
        _ => program(image, ram, mask, vcpus),
    }
}

/// The start of a program, page by page from the lowest address.
fn program(
    image: &Image,
    ram: &GuestRam,
    mask: SharedMask,
    vcpus: u32,
) -> Result<Vec<LaunchStep>, MachineError> {
    let program = measured::program(image, ram)?;
    let mut pages = measured::pages(&program)?;
    let stacks = u64::from(vcpus) * STACK;
    pages.put(TD_STACK_TOP.get() - stacks, stacks, &[]);
    pages.put_tables(TD_TABLES.get(), 0, mask.bits());
    let reset = reset_page(program.entry(), ram);
    pages.put(RESET_PAGE, PAGE_SIZE, &*reset);
    Ok(pages.into_steps())
}

/// The last page: code at its start, the descriptor table, and the jump of the reset vector.
fn reset_page(entry: Gpa, ram: &GuestRam) -> Contents {
    let mut page = Box::new([0; PAGE_SIZE as usize]);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &code(entry.get() as u32, ram.low_end().get()));
    let table: Vec<u8> = gdt(true)
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    put(GDT, &table);
    put(GDT_POINTER, &(table.len() as u16 - 1).to_le_bytes());
    put(
        GDT_POINTER + 2,
        &(RESET_PAGE as u32 + GDT as u32).to_le_bytes(),
    );
    put(RESET, &[0xe9]); // jmp to the start of the page
    put(RESET + 1, &(-(RESET as i32 + 5)).to_le_bytes());
    page
}

/// Machine code that switches to long mode and calls the entry, on each vCPU with a stack of its number. IA32_EFER has LME
/// set from the start, and is not the guest's to write. It leaves RCX alone, which TDH.VP.INIT sets, and RSI, which is
/// the number.
#[rustfmt::skip]
fn code(entry: u32, memory: u64) -> Vec<u8> {
    let at = |offset: usize| (RESET_PAGE as u32 + offset as u32).to_le_bytes();
    let mut code = Vec::new();
    code.extend([0x0f, 0x01, 0x15]); // lgdt [GDT_POINTER]
    code.extend(at(GDT_POINTER));
    code.push(0xb8); // mov eax, TD_TABLES
    code.extend((TD_TABLES.get() as u32).to_le_bytes());
    code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.extend([0x0f, 0x20, 0xe0]); // mov eax, cr4
    code.extend([0x0d, 0x20, 0x06, 0, 0]); // or eax, PAE | OSFXSR | OSXMMEXCPT
    code.extend([0x0f, 0x22, 0xe0]); // mov cr4, eax
    code.extend([0x0f, 0x20, 0xc0]); // mov eax, cr0
    code.extend([0x0d, 0x02, 0, 0, 0x80]); // or eax, PG | MP
    code.extend([0x0f, 0x22, 0xc0]); // mov cr0, eax
    code.push(0xea); // jmp BOOT_CS:next
    code.extend(at(code.len() + 6));
    code.extend(BOOT_CS.to_le_bytes());
    // next: 64-bit code
    code.push(0xb8); // mov eax, BOOT_DS
    code.extend(u32::from(BOOT_DS).to_le_bytes());
    code.extend([0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // mov ds, eax; mov es, eax; mov ss, eax
    code.extend([0x89, 0xf0, 0xc1, 0xe0, STACK_SHIFT]); // mov eax, esi; shl eax, STACK_SHIFT
    code.push(0xbc); // mov esp, TD_STACK_TOP
    code.extend((TD_STACK_TOP.get() as u32).to_le_bytes());
    code.extend([0x29, 0xc4]); // sub esp, eax
    code.extend([0x48, 0xbf]); // mov rdi, memory
    code.extend(memory.to_le_bytes());
    code.extend([0x89, 0xda, 0x83, 0xe2, 0x7f]); // mov edx, ebx; and edx, 127: the width of addresses
    code.push(0xb8); // mov eax, entry
    code.extend(entry.to_le_bytes());
    code.extend([0xff, 0xd0]); // call rax
    // park: TDG.VP.VMCALL<HLT>, for ever
    let park = [
        0x31, 0xc0, // xor eax, eax
        0xb9, 0x00, 0xfc, 0x00, 0x00, // mov ecx, R10 to R15
        0x45, 0x31, 0xd2, // xor r10d, r10d
        0x41, 0xbb, 0x0c, 0x00, 0x00, 0x00, // mov r11d, 12
        0x45, 0x31, 0xe4, // xor r12d, r12d
        0x66, 0x0f, 0x01, 0xcc, // tdcall
    ];
    code.extend(park);
    code.extend([0xeb, (-(park.len() as i8 + 2)) as u8]); // jmp park
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_of_the_last_page_do_not_overlap() {
        let code = code(0x20_0000, 1 << 30);
        assert!(code.len() <= GDT_POINTER, "{:#x}", code.len());
        let pieces = [GDT_POINTER + 6, GDT + 32, RESET + 5];
        assert!(pieces[0] <= GDT && pieces[1] <= RESET && pieces[2] <= 4096);
    }
}

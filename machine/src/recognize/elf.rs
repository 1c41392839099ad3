//! ELF files: the processor and the kind of program.

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, ET_REL, PT_INTERP};
use elf::endian::AnyEndian;
use elf::file::Class;
use elf::to_str::e_machine_to_human_str;

use super::{FileKind, Recognition, field};

const EI_CLASS: usize = 4;
const EI_DATA: usize = 5;
const E_MACHINE: usize = 18;
const BIG_ENDIAN: u8 = 2;

pub(super) fn look(bytes: &[u8]) -> Option<Recognition> {
    if !bytes.starts_with(b"\x7fELF") {
        return None;
    }
    let (Some([data]), Some(machine)) = (field(bytes, EI_DATA), field(bytes, E_MACHINE)) else {
        // The loader says what is missing.
        return Some(Recognition::new(FileKind::Elf, "the magic number of ELF"));
    };
    let machine = if data == BIG_ENDIAN {
        u16::from_be_bytes(machine)
    } else {
        u16::from_le_bytes(machine)
    };
    let name = match machine {
        EM_386 => "i386".to_owned(),
        EM_X86_64 => "x86-64".to_owned(),
        other => e_machine_to_human_str(other).map_or_else(
            || format!("machine {other:#x}"),
            |name| format!("{name}, machine {other:#x}"),
        ),
    };
    let (kind, why) = if ![EM_386, EM_X86_64].contains(&machine) || data == BIG_ENDIAN {
        (FileKind::ForeignElf, String::new())
    } else {
        of_x86(bytes)
    };
    let bits = match field(bytes, EI_CLASS) {
        Some([1]) => "32-bit ",
        Some([2]) => "64-bit ",
        _ => "",
    };
    let why = format!("the magic number of ELF, and a {bits}header of {name}{why}");
    Some(Recognition::new(kind, why))
}

fn of_x86(bytes: &[u8]) -> (FileKind, String) {
    // What cannot be parsed is the loader's to refuse, with the reason.
    let Ok(file) = ElfBytes::<AnyEndian>::minimal_parse(bytes) else {
        return (FileKind::Elf, String::new());
    };
    if file.ehdr.e_type == ET_REL {
        return (FileKind::ObjectFile, " with the type ET_REL".into());
    }
    let interpreter = file
        .segments()
        .and_then(|segments| segments.iter().find(|segment| segment.p_type == PT_INTERP))
        .and_then(|segment| file.segment_data(&segment).ok());
    match interpreter {
        Some(path) => {
            let path = String::from_utf8_lossy(path);
            let path = path.trim_end_matches('\0').escape_debug();
            let why = format!(" that asks for the interpreter {path}");
            (FileKind::UserProgram, why)
        }
        None => {
            let entry = match file.ehdr.class {
                Class::ELF32 => "protected",
                Class::ELF64 => "long",
            };
            (FileKind::Elf, format!(": it starts in {entry} mode"))
        }
    }
}

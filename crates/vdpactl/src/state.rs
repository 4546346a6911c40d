//! `vdpactl dev state`: the state of a device that moves to another host, as a file.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};

use vdpa_core::device::moving::STATE_MAX;

use crate::Session;
use crate::failure::Failure;
use crate::grammar::unknown_option;

const HELP: &str = "\
Usage: vdpactl dev state save DEV [ FILE | - ]
       vdpactl dev state load DEV { FILE | - }
";

/// Runs one command.
pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["save", name] => save(session, name, None),
        ["save", name, "-"] => write(&mut io::stdout(), &session.client.save_state(name)?),
        ["save", name, file] => save(session, name, Some(file)),
        ["load", name, file] => load(session, name, file),
        ["save" | "load"] => Err(Failure::Usage("device name is required".into())),
        ["load", _] => Err(Failure::Usage("a file is required, or - for standard input".into())),
        ["save" | "load", _, _, extra, ..] => Err(unknown_option(extra)),
        [] | ["help", ..] => {
            eprint!("{HELP}");
            Ok(())
        }
        [word, ..] => Err(crate::grammar::no_command(word)),
    }
}

fn save(session: &Session, name: &str, file: Option<&str>) -> Result<(), Failure> {
    let Some(file) = file else {
        if io::stdout().is_terminal() {
            return Err(Failure::Usage(
                "a state is not for a terminal: name a file, or redirect the output".into(),
            ));
        }
        return write(&mut io::stdout(), &session.client.save_state(name)?);
    };
    let state = session.client.save_state(name)?;
    // Whoever loads it is to find all of it or nothing.
    let partial = format!("{file}.partial");
    let mut new = File::create(&partial).map_err(Failure::Output)?;
    write(&mut new, &state)?;
    new.sync_all().and_then(|()| std::fs::rename(&partial, file)).map_err(Failure::Output)
}

fn write(out: &mut dyn Write, state: &[u8]) -> Result<(), Failure> {
    out.write_all(state).and_then(|()| out.flush()).map_err(Failure::Output)
}

fn load(session: &Session, name: &str, file: &str) -> Result<(), Failure> {
    let input: Result<Box<dyn Read>, io::Error> = if file == "-" {
        Ok(Box::new(io::stdin()))
    } else {
        File::open(file).map(|file| Box::new(file) as _)
    };
    let mut state = Vec::new();
    let most = STATE_MAX as u64 + 1;
    input
        .and_then(|input| input.take(most).read_to_end(&mut state))
        .map_err(|error| Failure::Usage(format!("cannot read {file}: {error}")))?;
    if state.len() > STATE_MAX {
        return Err(Failure::Usage(format!(
            "{file} is no state of a device: it has more than {STATE_MAX} bytes"
        )));
    }
    Ok(session.client.load_state(name, state)?)
}

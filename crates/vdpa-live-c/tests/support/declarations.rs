//! [`functions`] and [`manual`]: what a header that cbindgen has made declares, and a manual page of it.

/// One function of the header.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    /// As in the header, on one line.
    pub(crate) prototype: String,
    /// Its paragraphs, separated by empty lines.
    pub(crate) comment: String,
}

/// What is at the beginning of a line of the header, with the comment before it.
struct Block {
    comment: String,
    text: String,
}

/// The header without its structure of lines: each comment at the margin with what follows it up to an empty line.
fn blocks(header: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = header.lines();
    while let Some(line) = lines.next() {
        if line != "/**" {
            continue;
        }
        let comment: Vec<&str> = lines.by_ref().take_while(|line| *line != " */").map(content).collect();
        let text: Vec<&str> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
        blocks.push(Block { comment: comment.join("\n"), text: text.join("\n") });
    }
    blocks
}

/// A line of a comment without its margin.
fn content(line: &str) -> &str {
    line.trim_start().trim_start_matches('*').trim()
}

pub(crate) fn functions(header: &str) -> Vec<Function> {
    let all = blocks(header).into_iter().filter_map(|Block { comment, text }| {
        let is_one = text.ends_with(");") && !text.starts_with("typedef");
        let (before, _) = text.split_once('(').filter(|_| is_one)?;
        let name = before.rsplit([' ', '*']).next()?.to_owned();
        let prototype = text.split_whitespace().collect::<Vec<_>>().join(" ");
        Some(Function { name, prototype, comment })
    });
    all.collect()
}

/// A paragraph of roff: no line is taken for a request, and a minus is one that can be copied.
fn roff(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
        match line.is_empty() {
            true => ".PP\n".to_owned(),
            false => format!("{guard}{line}\n"),
        }
    });
    lines.collect()
}

/// The manual page of a header.
pub(crate) fn manual(header: &str, version: &str) -> String {
    let mut page = format!(
        ".\\\" Made from vdpa-live.h: scripts/make-c-header\n.TH LIBVDPA-LIVE 3 \"\" \"libvdpa-live {version}\"\n"
    );
    let mut blocks = blocks(header);
    let about = blocks.remove(0).comment;
    let (title, rules) = about.split_once("\n\n").unwrap_or((&about, ""));
    let title = title.trim_end_matches('.').trim_start_matches("libvdpa-live: ");
    page += &format!(".SH NAME\nlibvdpa\\-live \\- {}", roff(title));
    page += ".SH SYNOPSIS\n.nf\n#include <vdpa\\-live.h>\n.PP\ncc ... $(pkg\\-config \\-\\-cflags \\-\\-libs libvdpa\\-live)\n.fi\n";
    page += &format!(".SH DESCRIPTION\n{}", roff(rules));
    page += ".SH FUNCTIONS\n";
    for Function { name, prototype, comment } in functions(header) {
        page += &format!(".SS {name}()\n.nf\n{}.fi\n.PP\n{}", roff(&wrapped(&prototype)), roff(&comment));
    }
    page += ".SH TYPES\n";
    for Block { comment, text } in blocks
        .iter()
        .filter(|b| !b.text.starts_with('#') && !b.text.ends_with(");") || b.text.starts_with("typedef"))
    {
        let first = text.lines().next().unwrap_or_default();
        page +=
            &format!(".SS {}\n{}", roff(first.trim_end_matches([' ', '{', ';'])).trim_end(), roff(comment));
        if text.contains('\n') {
            page += &format!(".PP\n.nf\n{}.fi\n", roff(text));
        }
    }
    page += ".SH CONSTANTS\n";
    for Block { comment, text } in blocks.iter().filter(|b| b.text.starts_with("#define")) {
        page += &format!(".TP\n{}{}", roff(text.trim_start_matches("#define ")), roff(comment));
    }
    page + ".SH SEE ALSO\n.BR execve (2),\n.BR poll (2)\n.PP\nThe project has an example and the concepts: docs/c\\-api.md.\n"
}

/// A prototype with one argument on each line, if it is long.
fn wrapped(prototype: &str) -> String {
    if prototype.len() < 76 {
        return prototype.to_owned();
    }
    let (head, arguments) = prototype.split_once('(').unwrap_or((prototype, ""));
    format!("{head}(\n    {}", arguments.replace(", ", ",\n    "))
}

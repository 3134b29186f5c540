//! Which source file uses names of which other file, read from the syntax of a crate.
//!
//! Names are resolved through `use` declarations and re-exports to the file that defines them. Methods and trait
//! implementations are not seen, and neither are names that only a macro's expansion contains.

use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// Maximum number of re-exports that are followed to find one name.
const MAX_REEXPORTS: usize = 16;

/// The files of a crate, and the names that each takes from others.
pub struct Imports {
    files: Vec<PathBuf>,
    /// The names of an edge, by the file that uses them and the file that defines them.
    edges: BTreeMap<(usize, usize), BTreeSet<String>>,
}

/// A module: its file and the names in its scope.
struct Module {
    file: usize,
    parent: usize,
    children: HashMap<String, usize>,
    definitions: BTreeSet<String>,
    /// Names bound by `use`, and the path of each.
    bindings: HashMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
}

/// What a path stands for.
#[derive(Clone, Copy)]
enum Meaning {
    Module(usize),
    /// An item defined in this file.
    Item(usize),
}

#[derive(Default)]
struct Tree {
    files: Vec<PathBuf>,
    modules: Vec<Module>,
    /// The paths in each module that may name something.
    paths: Vec<(usize, Vec<String>)>,
}

impl Imports {
    /// Reads the crate with the root file `root`.
    pub fn read(root: &Path) -> Self {
        let mut tree = Tree::default();
        tree.read_file(root.to_path_buf(), None);
        let mut edges: BTreeMap<(usize, usize), BTreeSet<String>> = BTreeMap::new();
        for (module, path) in &tree.paths {
            let from = tree.modules[*module].file;
            if let Some((Meaning::Item(to), name)) = tree.resolve(*module, path, MAX_REEXPORTS)
                && to != from
            {
                edges.entry((from, to)).or_default().insert(name);
            }
        }
        Self { files: tree.files, edges }
    }

    /// The source files of the crate.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The number of pairs of files of which the first uses names of the second.
    pub fn num_edges(&self) -> usize {
        self.edges.len()
    }

    /// The groups of files that use each other, directly or through others.
    pub fn circles(&self) -> Vec<Vec<&Path>> {
        let reachable: Vec<BTreeSet<usize>> = (0..self.files.len()).map(|file| self.reachable(file)).collect();
        let circle_of = |file: usize| -> BTreeSet<usize> {
            reachable[file].iter().copied().filter(|other| reachable[*other].contains(&file)).collect()
        };
        let circles: BTreeSet<_> = (0..self.files.len()).map(circle_of).filter(|circle| !circle.is_empty()).collect();
        circles.iter().map(|circle| circle.iter().map(|file| self.files[*file].as_path()).collect()).collect()
    }

    /// The uses among `files` as lines `file -> file: names`, with paths relative to `root`.
    pub fn describe(&self, files: &[&Path], root: &Path) -> String {
        let path = |file: usize| self.files[file].as_path();
        let among = |((from, to), _): &(&(usize, usize), _)| files.contains(&path(*from)) && files.contains(&path(*to));
        let shown = |file: usize| path(file).strip_prefix(root).unwrap().display();
        let lines = self.edges.iter().filter(among).map(|((from, to), names)| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            format!("  {} -> {}: {}", shown(*from), shown(*to), names.join(", "))
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The files that `file` uses, directly or through others.
    fn reachable(&self, file: usize) -> BTreeSet<usize> {
        let (mut found, mut waiting) = (BTreeSet::new(), vec![file]);
        while let Some(file) = waiting.pop() {
            let next = self.edges.range((file, 0)..=(file, usize::MAX)).map(|((_, to), _)| *to);
            waiting.extend(next.filter(|to| found.insert(*to)));
        }
        found
    }
}

impl Tree {
    /// Adds a file and the modules below it; returns the file's module.
    fn read_file(&mut self, path: PathBuf, parent: Option<usize>) -> usize {
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let folder = path.parent().unwrap().to_path_buf();
        let folder = if ["lib", "main", "mod"].contains(&stem.as_str()) { folder } else { folder.join(stem) };
        self.files.push(path);
        self.add_module(self.files.len() - 1, &folder, parent, &syntax.items)
    }

    fn add_module(&mut self, file: usize, folder: &Path, parent: Option<usize>, items: &[Item]) -> usize {
        let module = self.modules.len();
        self.modules.push(Module {
            file,
            parent: parent.unwrap_or(module),
            children: HashMap::new(),
            definitions: BTreeSet::new(),
            bindings: HashMap::new(),
            globs: Vec::new(),
        });
        let mut paths = Paths::default();
        // tests are read only where they have a file of their own
        let is_left_out =
            |item: &Item| is_test(attributes(item)) && !matches!(item, Item::Mod(m) if m.content.is_none());
        for item in items.iter().filter(|item| !is_left_out(item)) {
            match item {
                Item::Mod(child) if has_path(&child.attrs) => {}
                Item::Mod(child) => {
                    let name = child.ident.to_string();
                    let below = folder.join(&name);
                    let id = if let Some((_, items)) = &child.content {
                        self.add_module(file, &below, Some(module), items)
                    } else {
                        let beside = folder.join(format!("{name}.rs"));
                        let path = if beside.is_file() { beside } else { below.join("mod.rs") };
                        self.read_file(path, Some(module))
                    };
                    self.modules[module].children.insert(name, id);
                }
                Item::Use(declaration) => self.bind(module, &declaration.tree, &mut Vec::new()),
                other => {
                    self.modules[module].definitions.extend(defined_name(other));
                    paths.visit_item(other);
                }
            }
        }
        // `use` within functions binds names for the whole module here
        for tree in paths.uses {
            self.bind(module, &tree, &mut Vec::new());
        }
        self.paths.extend(paths.paths.into_iter().map(|path| (module, path)));
        module
    }

    fn bind(&mut self, module: usize, tree: &UseTree, prefix: &mut Vec<String>) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.bind(module, &path.tree, prefix);
                prefix.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.bind(module, tree, prefix)),
            UseTree::Glob(_) => self.modules[module].globs.push(prefix.clone()),
            UseTree::Name(name) => self.bind_name(module, name.ident.to_string(), None, prefix),
            UseTree::Rename(name) => {
                self.bind_name(module, name.ident.to_string(), Some(name.rename.to_string()), prefix);
            }
        }
    }

    fn bind_name(&mut self, module: usize, name: String, alias: Option<String>, prefix: &[String]) {
        let mut path = prefix.to_vec();
        if name != "self" {
            path.push(name);
        }
        let alias = alias.unwrap_or_else(|| path[path.len() - 1].clone());
        self.modules[module].bindings.insert(alias, path.clone());
        self.paths.push((module, path));
    }

    /// What `path` stands for in `module`, and the name of the item.
    fn resolve(&self, module: usize, path: &[String], budget: usize) -> Option<(Meaning, String)> {
        let (first, mut rest) = path.split_first()?;
        let mut meaning = match first.as_str() {
            "crate" => Meaning::Module(0),
            "self" => Meaning::Module(module),
            "super" => Meaning::Module(self.modules[module].parent),
            name => self.look_up(module, name, path.len() == 1, budget)?,
        };
        let mut name = first;
        while let (Meaning::Module(inner), Some((next, after))) = (meaning, rest.split_first()) {
            meaning = match next.as_str() {
                "super" => Meaning::Module(self.modules[inner].parent),
                next => self.look_up(inner, next, false, budget)?,
            };
            (name, rest) = (next, after);
        }
        Some((meaning, name.clone()))
    }

    /// What `name` stands for within `module`; a path that starts with its own binding (`use tar; tar::x`) is external.
    fn look_up(&self, module: usize, name: &str, is_own: bool, budget: usize) -> Option<Meaning> {
        let scope = &self.modules[module];
        if let Some(child) = scope.children.get(name) {
            return Some(Meaning::Module(*child));
        }
        if scope.definitions.contains(name) {
            return Some(Meaning::Item(scope.file));
        }
        let budget = budget.checked_sub(1)?;
        if let Some(path) = scope.bindings.get(name) {
            if path.len() == 1 && (is_own || path[0] == name) {
                return None;
            }
            return self.resolve(module, path, budget).map(|(meaning, _)| meaning);
        }
        scope.globs.iter().find_map(|glob| {
            let (Meaning::Module(inner), _) = self.resolve(module, glob, budget)? else { return None };
            (inner != module).then(|| self.look_up(inner, name, false, budget))?
        })
    }
}

/// Collects the paths of expressions, types, patterns, attributes and macro arguments.
#[derive(Default)]
struct Paths {
    paths: Vec<Vec<String>>,
    uses: Vec<UseTree>,
}

impl Paths {
    /// The paths `a::b::c` among tokens.
    fn read_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.paths.push(std::mem::take(&mut path));
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    self.paths.push(std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.read_tokens(group.stream());
                    }
                }
            }
        }
        self.paths.push(path);
        self.paths.retain(|path| !path.is_empty());
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_meta_list(&mut self, list: &'ast syn::MetaList) {
        self.read_tokens(list.tokens.clone());
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        visit::visit_path(self, &call.path);
        self.read_tokens(call.tokens.clone());
    }

    fn visit_item_use(&mut self, declaration: &'ast syn::ItemUse) {
        self.uses.push(declaration.tree.clone());
    }
}

/// Whether an item is only compiled for tests.
fn is_test(attributes: &[Attribute]) -> bool {
    let is_test = |attribute: &Attribute| {
        attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Ident>().is_ok_and(|name| name == "test")
    };
    attributes.iter().any(is_test)
}

/// Whether a module is a file of another folder: `#[path = "..."]`.
fn has_path(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| attribute.path().is_ident("path"))
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Const(item) => &item.attrs,
        _ => &[],
    }
}

fn defined_name(item: &Item) -> Option<String> {
    Some(match item {
        Item::Const(item) => item.ident.to_string(),
        Item::Enum(item) => item.ident.to_string(),
        Item::Fn(item) => item.sig.ident.to_string(),
        Item::Macro(item) => item.ident.as_ref()?.to_string(),
        Item::Static(item) => item.ident.to_string(),
        Item::Struct(item) => item.ident.to_string(),
        Item::Trait(item) => item.ident.to_string(),
        Item::Type(item) => item.ident.to_string(),
        Item::Union(item) => item.ident.to_string(),
        _ => return None,
    })
}

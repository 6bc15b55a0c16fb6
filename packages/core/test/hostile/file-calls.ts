import { resolve } from 'node:path'

// The lines of `strace -f -y`.

/** Files that are opened for writing, by the path that the kernel tells of them; some calls end in a later line. */
export function written(calls: readonly string[]): string[] {
  const begun = new Set<string>()
  return calls.flatMap(line => {
    const [pid = ''] = line.split(' ')
    if (/\bopen\w*\(.*\b(O_WRONLY|O_RDWR|O_CREAT|O_TRUNC)\b/.test(line) || /\bcreat\(/.test(line))
      begun.add(pid)
    else if (!/<\.\.\. open\w* resumed>/.test(line)) return []
    if (line.endsWith('<unfinished ...>') || !begun.delete(pid)) return []
    const opened = /= \d+<([^>]*)>/.exec(line)?.[1]
    return opened === undefined || opened === '/dev/null' ? [] : opened
  })
}

/** What changes files, their names or their properties without opening them. */
export const CHANGES = [
  ...['mkdir', 'mkdirat', 'mknod', 'mknodat', 'rmdir', 'unlink', 'unlinkat', 'link', 'linkat'],
  ...['symlink', 'symlinkat', 'rename', 'renameat', 'renameat2', 'truncate', 'chmod', 'fchmodat'],
  ...['chown', 'lchown', 'fchownat', 'utime', 'utimes', 'utimensat', 'setxattr', 'lsetxattr', 'removexattr'],
]
/** A name in a call, after the open folder that it is looked for in, if there is one. */
const NAME = /(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"/g

/** What such calls name; `cwd` is where the traced program runs. */
export function changed(calls: readonly string[], cwd: string): string[] {
  return calls.flatMap(line => {
    const [, call = '', given = ''] = /^\d+ +(\w+)\((.*)/.exec(line) ?? []
    if (!CHANGES.includes(call)) return []
    const names = [...given.matchAll(NAME)].map(([, folder = cwd, name = '']) => resolve(folder, name))
    return call.startsWith('symlink') ? names.slice(1) : names // the text of a link is no name that is gone to
  })
}

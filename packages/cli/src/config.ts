import { open } from 'node:fs/promises'
import { isAbsolute, join, resolve } from 'node:path'
import { errorMessage, isVarveError, type StorageDriver, VarveError } from '@varve/core'
import { z } from 'zod'
import { ambiguousRemotes } from './ambiguous-remotes.ts'
import { type CephSettings, cephSettings } from './ceph-settings.ts'
import { configError, describeIssues, fieldName } from './config-error.ts'
import { assertOwnFile, assertOwnPlace } from './config-owner.ts'
import { readSecret } from './secret.ts'
import type { StorageOpener, StorageType } from './storage-type.ts'
import { STORAGE_TYPES } from './storage-types.ts'

const EXAMPLE = '{ "storages": { "nas": { "type": "local", "path": "/mnt/backup" } } }'

const document = z.strictObject({
  storages: z.record(z.string(), z.looseObject({ type: z.string() })),
  stateDir: z.string().refine(isAbsolute, 'must be an absolute path, such as /var/lib/varve').exactOptional(),
  libvirtUri: z.string().min(1, 'must not be empty').exactOptional(),
  ceph: cephSettings.exactOptional(),
})

/** A configuration file that is valid. */
export interface Config {
  /** The file. */
  readonly path: string
  /** By name, in the file's order; at least one. */
  readonly storages: ReadonlyMap<string, StorageOpener>
  readonly stateDir?: string
  readonly libvirtUri?: string
  /** How disks that are RBD images are reached, where a domain does not tell. Default: as Ceph's own configuration says. */
  readonly ceph?: CephSettings
}

/** Options of {@link loadConfig}. */
export interface LoadConfigOptions {
  /** The file that `--config` names. */
  path?: string | undefined
  /** Has `VARVE_CONFIG`. */
  env: Readonly<Record<string, string | undefined>>
  /** Where relative paths begin. */
  cwd: string
}

/**
 * Reads the configuration: the file that was named, or the first there is of `./varve.config.json` and
 * `/etc/varve/config.json`. That of the current folder is refused where somebody else could have written it.
 *
 * @throws INVALID_CONFIG
 */
export async function loadConfig({ path, env, cwd }: LoadConfigOptions): Promise<Config> {
  const named = path ?? (env.VARVE_CONFIG || undefined)
  const local = resolve(cwd, 'varve.config.json')
  const candidates = named === undefined ? [local, '/etc/varve/config.json'] : [resolve(cwd, named)]
  for (const candidate of candidates) {
    // Whoever can write to the current folder must not choose what a caller runs who did not ask for it.
    const mustBeOwn = named === undefined && candidate === local
    const text = await readText(candidate, { mustBeOwn })
    if (text !== undefined) return parseConfig(text, candidate)
  }
  throw new VarveError(
    'INVALID_CONFIG',
    `There is no configuration at ${candidates.join(' or ')}. Name one with --config or VARVE_CONFIG, or make one such as ${EXAMPLE}.`,
    { context: { path: candidates } },
  )
}

async function readText(path: string, { mustBeOwn }: { mustBeOwn: boolean }): Promise<string | undefined> {
  try {
    if (mustBeOwn) await assertOwnPlace(path)
    await using file = await open(path)
    if (mustBeOwn) await assertOwnFile(path, file)
    return await file.readFile('utf8')
  } catch (error) {
    if (isVarveError(error)) throw error
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined
    const isFolder = error instanceof Error && 'code' in error && error.code === 'EISDIR'
    const what = isFolder ? 'is a folder' : `cannot be read: ${errorMessage(error)}`
    const remedy = isFolder
      ? `Name the file in it, such as ${join(path, 'varve.config.json')}.`
      : 'Check its path, its owner and its permissions.'
    throw new VarveError('INVALID_CONFIG', `The configuration ${path} ${what}. ${remedy}`, {
      context: { path },
      cause: error,
    })
  }
}

/**
 * Checks the text of a configuration file.
 *
 * @throws INVALID_CONFIG with every field that is wrong
 */
export function parseConfig(
  text: string,
  path: string,
  types: ReadonlyMap<string, StorageType> = STORAGE_TYPES,
): Config {
  const parsed = document.safeParse(parseJson(text, path))
  if (!parsed.success) throw configError(path, describeIssues(parsed.error.issues, []))
  const { storages: entries, ...settings } = parsed.data
  const storages = new Map<string, StorageOpener>()
  const problems: string[] = []
  for (const [name, { type, ...entry }] of Object.entries(entries)) {
    const at = ['storages', name]
    const known = types.get(type)
    const checked = known?.check(entry)
    if (!/^[A-Za-z0-9][\w.-]*$/.test(name))
      problems.push(`${fieldName(at)}: a storage's name has letters, digits, ".", "_" and "-"`)
    else if (!checked)
      problems.push(
        `${fieldName([...at, 'type'])}: ${JSON.stringify(type)} is no kind of storage that varve knows (${[...types.keys()].join(', ')})`,
      )
    else if ('issues' in checked) problems.push(...describeIssues(checked.issues, at))
    else storages.set(name, checked.open)
  }
  problems.push(...ambiguousRemotes(entries))
  if (problems.length > 0) throw configError(path, problems)
  if (storages.size === 0) throw configError(path, [`storages: at least one is needed, such as ${EXAMPLE}`])
  return { path, storages, ...settings }
}

function parseJson(text: string, path: string): unknown {
  try {
    return JSON.parse(text.replace(/^\u{feff}/u, ''))
  } catch (error) {
    // The parser's own message quotes the file, where a secret may be; only the place is taken from it.
    const place = /\(line \d+ column \d+\)/.exec(errorMessage(error))?.[0]
    throw configError(path, [`it is no JSON${place === undefined ? '' : ` ${place}`}`])
  }
}

/**
 * Makes the driver of a storage; with no name, of the only one.
 *
 * @throws INVALID_ARGUMENT for a name that is not there, or where one is needed; INVALID_CONFIG for a secret
 * that cannot be read
 */
export async function openStorage(
  { path: configPath, storages }: Config,
  name: string | undefined,
  env: Readonly<Record<string, string | undefined>>,
): Promise<StorageDriver> {
  const names = [...storages.keys()]
  const chosen = name ?? (names.length === 1 ? names[0] : undefined)
  const open = chosen === undefined ? undefined : storages.get(chosen)
  if (chosen === undefined || !open) {
    const what =
      chosen === undefined ? 'There are several storages' : `There is no storage ${JSON.stringify(chosen)}`
    throw new VarveError(
      'INVALID_ARGUMENT',
      `${what} in ${configPath}. Choose one of: ${names.join(', ')}.`,
      { context: { path: configPath, storages: names } },
    )
  }
  return open((option, secret) =>
    readSecret(secret, { configPath, field: fieldName(['storages', chosen, option]), env }),
  )
}

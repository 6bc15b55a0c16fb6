import { VarveError } from '@varve/core'
import { NO_TEMPORARY_FOLDER } from './rclone-error.ts'
import type { RcloneHelperOptions } from './rclone-options.ts'

/** Options of remotes and variables that tell no secret: all others may. */
const HARMLESS_NAME =
  /(^|_)(type|provider|vendor|host|port|user|username|region|location|endpoint|url|proxy|remote|domain|acl|class|encoding|encryption|size|concurrency|cutoff|limit|level|dump|timeout|sock|dir|home)$/i
/** Names that are secrets however they end, such as `sas_url`. */
const SECRET_NAME = /pass|secret|token|key|credential|sas_url|bearer|cookie|connection_string/i
/** Options whose names look like secrets, but that are paths. */
const PATH_NAME = /(^|_)(file|path)$/i
/** A shorter secret would be found in half of all words. */
const SHORTEST_SECRET = 3
/** What rclone gets of this process's environment. */
const PASSED_ON = ['PATH', 'HOME', 'XDG_CONFIG_HOME'] as const

/** One backend, as `rclone config providers` tells of it. */
export interface Backend {
  /** Its type, such as `s3`. */
  readonly type: string
  /** The names of its options, and whether each is kept obscured. */
  readonly options: ReadonlyMap<string, { readonly isPassword: boolean }>
}

/** The backends in what `rclone config providers` prints. @throws STORAGE_FAILED */
export function parseBackends(json: string): Backend[] {
  try {
    const providers = JSON.parse(json) as {
      Prefix: string
      Options: { Name: string; IsPassword: boolean }[]
    }[]
    return providers.map(({ Prefix, Options }) => {
      const options = new Map<string, { isPassword: boolean }>()
      // an option may be there once for each vendor
      for (const { Name, IsPassword } of Options) {
        options.set(Name, { isPassword: IsPassword || options.get(Name)?.isPassword === true })
      }
      return { type: Prefix, options }
    })
  } catch (cause) {
    throw new VarveError(
      'STORAGE_FAILED',
      'rclone config providers printed no list of backends. See that command is rclone itself, and what `rclone version` says.',
      { cause },
    )
  }
}

/**
 * What of rclone's environment does not depend on the remotes that are given. There is no folder for temporary files
 * in it: what cannot be uploaded without one is not.
 */
export function baseEnvironment(options: RcloneHelperOptions): Record<string, string> {
  const env: Record<string, string> = {}
  for (const name of PASSED_ON) {
    const value = process.env[name]
    if (value !== undefined) env[name] = value
  }
  return { ...env, ...options.env, TMPDIR: NO_TEMPORARY_FOLDER }
}

/**
 * The variables that make the given remotes (rclone.org/docs, "Config file" under "Environment Variables").
 *
 * @throws INVALID_CONFIG for a type or an option that rclone does not know
 */
export async function remoteVariables(
  remotes: NonNullable<RcloneHelperOptions['remotes']>,
  backends: readonly Backend[],
  obscure: (password: string) => Promise<string>,
): Promise<Record<string, string>> {
  const env: Record<string, string> = {}
  for (const [name, { type = '', ...remote }] of Object.entries(remotes)) {
    const backend = backends.find(backend => backend.type === type)
    if (!backend) throw unknown(name, 'its type', 'see rclone.org/overview')
    env[variable(name, 'type')] = type
    for (const [option, value] of Object.entries(remote)) {
      const known = backend.options.get(option)
      if (!known)
        throw unknown(
          name,
          `${type}'s option ${JSON.stringify(option)}`,
          `see \`rclone help backend ${type}\``,
        )
      env[variable(name, option)] = known.isPassword ? await obscure(value) : value
    }
  }
  return env
}

/** What may be in no message: values that are given, what is secret in them, and what HTTP makes of a password. */
export function secretsOf({ remotes = {}, env = {} }: RcloneHelperOptions): string[] {
  return [...Object.values(remotes), env].flatMap(options => {
    const secrets = Object.entries(options).flatMap(([name, value]) => secretsIn(name, value))
    const user = options.user ?? options.username
    return user === undefined ? secrets : [...secrets, ...secrets.map(secret => basicAuth(user, secret))]
  })
}

function secretsIn(name: string, value: string): string[] {
  if (/^(true|false)?$/.test(value)) return []
  const isHarmless = PATH_NAME.test(name) || (HARMLESS_NAME.test(name) && !SECRET_NAME.test(name))
  // a list of headers is sent, and printed, one by one
  const headers = /headers?(_|$)/i.test(name) ? value.split(/,|: /) : []
  return [
    ...(isHarmless ? [] : [value]),
    ...headers,
    ...secretsOfAddress(value),
    ...secretsOfConnection(value),
  ]
}

/** Those of `https://user:password@host`, or of `https://token@host`. */
function secretsOfAddress(text: string): string[] {
  const [, user = '', password] = /\/\/([^\s/:@]*)(?::([^\s/]*))?@/.exec(text) ?? []
  if (password === undefined) return [user, unescaped(user)]
  return [password, unescaped(password), basicAuth(unescaped(user), unescaped(password))]
}

/** Those of a remote that is given by `:type,option=value,…:` in place of a name. */
function secretsOfConnection(text: string): string[] {
  return [...text.matchAll(/,(\w+)=("[^"]*"|'[^']*'|[^,:]*)/g)].flatMap(([, name = '', value = '']) =>
    secretsIn(name, value.replace(/^(["'])(.*)\1$/, '$2')),
  )
}

function basicAuth(user: string, password: string): string {
  return Buffer.from(`${user}:${password}`).toString('base64')
}

function unescaped(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text // it was not escaped
  }
}

/**
 * Takes secrets out of a text, also the lines of one that has several, and where they are escaped as in an address or
 * in quotes. Passwords in addresses are taken out whoever gave them. One of fewer than three characters stays elsewhere.
 */
export function redact(text: string, secrets: readonly string[]): string {
  const parts = new Set(secrets.flatMap(secret => [secret, ...secret.split(/\r?\n/)]))
  const patterns = [...parts]
    .filter(part => part.length >= SHORTEST_SECRET)
    .sort((a, b) => b.length - a.length) // the longest first: one may be the beginning of another
    .map(part => [...part].map(anyForm).join(''))
  const rest = patterns.length === 0 ? text : text.replace(new RegExp(patterns.join('|'), 'g'), '***')
  return rest.replace(/(\/\/[^\s/:@"']*:)[^\s/"']*@/g, '$1***@')
}

/** A pattern for a character as it is, or as Go escapes it in addresses, strings and JSON. */
function anyForm(char: string): string {
  const bytes = [...Buffer.from(char)].map(byte => byte.toString(16).padStart(2, '0'))
  const hex = (byte: string) => byte.replace(/[a-f]/g, digit => `[${digit}${digit.toUpperCase()}]`)
  const forms = [
    `\\\\?${char.replace(/[\\^$.*+?()[\]{}|/]/, '\\$&')}`,
    bytes.map(byte => `%${hex(byte)}`).join(''),
    ...(bytes.length === 1 ? [`\\\\u00${hex(bytes[0] ?? '')}`] : []),
    ...(char === ' ' ? ['\\+'] : []),
    ...(char === '\n' ? ['\\\\n'] : []),
  ]
  return `(?:${forms.join('|')})`
}

function variable(remote: string, option: string): string {
  return `RCLONE_CONFIG_${remote}_${option}`.toUpperCase()
}

function unknown(remote: string, what: string, where: string): VarveError {
  return new VarveError('INVALID_CONFIG', `remotes.${remote}: rclone does not know ${what}: ${where}.`, {
    context: { remote },
  })
}

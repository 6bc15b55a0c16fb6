import { VarveError } from '@varve/core'
import { NO_TEMPORARY_FOLDER } from './rclone-error.ts'
import type { RcloneHelperOptions } from './rclone-options.ts'

/** Options of a remote that are secrets, as far as their names tell. */
const SECRET_NAME = /pass|secret|token|key|credential|sas_url|bearer|cookie|connection_string/i
/** Options whose names look like secrets, but that are paths. */
const PATH_NAME = /_(file|path)$/i
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
    throw new VarveError('STORAGE_FAILED', 'rclone config providers printed no list of backends.', { cause })
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
    if (!backend) throw unknown(name, `its type ${JSON.stringify(type)}`, 'see rclone.org/overview')
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

/** The values that may be in no message. */
export function secretsOf({ remotes = {}, env = {} }: RcloneHelperOptions): string[] {
  return [...Object.values(remotes), env]
    .flatMap(options => Object.entries(options))
    .filter(
      ([name, value]) => SECRET_NAME.test(name) && !PATH_NAME.test(name) && value.length >= SHORTEST_SECRET,
    )
    .map(([, value]) => value)
}

/** Takes secrets out of a text, also where they are part of an address. */
export function redact(text: string, secrets: readonly string[]): string {
  const forms = secrets.flatMap(secret => [secret, encodeURIComponent(secret)])
  // the longest first: one may be the beginning of another
  return forms.sort((a, b) => b.length - a.length).reduce((rest, form) => rest.replaceAll(form, '***'), text)
}

function variable(remote: string, option: string): string {
  return `RCLONE_CONFIG_${remote}_${option}`.toUpperCase()
}

function unknown(remote: string, what: string, where: string): VarveError {
  return new VarveError('INVALID_CONFIG', `remotes.${remote}: rclone does not know ${what}: ${where}.`, {
    context: { remote },
  })
}

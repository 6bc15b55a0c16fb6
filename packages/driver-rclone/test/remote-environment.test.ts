import { expect, test } from 'vitest'
import {
  baseEnvironment,
  parseBackends,
  redact,
  remoteVariables,
  secretsOf,
} from '../src/remote-environment.ts'

const backends = parseBackends(
  JSON.stringify([
    {
      Prefix: 'sftp',
      Options: [
        { Name: 'host', IsPassword: false },
        { Name: 'pass', IsPassword: true },
      ],
    },
    {
      Prefix: 'koofr', // the same option once for each vendor
      Options: [
        { Name: 'password', IsPassword: true },
        { Name: 'password', IsPassword: false },
      ],
    },
  ]),
)
const obscure = async (password: string) => `<${password}>`

test('a given remote becomes variables, with its passwords obscured', async () => {
  const remotes = {
    nas: { type: 'sftp', host: 'nas.lan', pass: 'hunter2' },
    k: { type: 'koofr', password: 'p' },
  }
  expect(await remoteVariables(remotes, backends, obscure)).toEqual({
    RCLONE_CONFIG_NAS_TYPE: 'sftp',
    RCLONE_CONFIG_NAS_HOST: 'nas.lan',
    RCLONE_CONFIG_NAS_PASS: '<hunter2>',
    RCLONE_CONFIG_K_TYPE: 'koofr',
    RCLONE_CONFIG_K_PASSWORD: '<p>',
  })
})

test.each([
  [{ nas: { type: 'hunter2' } }, 'remotes.nas: rclone does not know its type'],
  [{ nas: { type: 'sftp', password: 'hunter2' } }, 'password'],
])('what rclone does not know is refused without its value: %j', async (remotes, named) => {
  const refused = remoteVariables(remotes, backends, obscure)
  await expect(refused).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringContaining(named),
  })
  await expect(refused).rejects.not.toThrow(/hunter2/)
})

test('rclone gets little of this environment, and no folder for temporary files', () => {
  process.env.AWS_CA_BUNDLE = '/x'
  process.env.RCLONE_DRY_RUN = 'true'
  try {
    const env = baseEnvironment({ remoteName: 'nas', env: { HTTPS_PROXY: 'http://proxy', TMPDIR: '/tmp' } })
    expect(Object.keys(env).filter(name => !['PATH', 'HOME', 'XDG_CONFIG_HOME'].includes(name))).toEqual([
      'HTTPS_PROXY',
      'TMPDIR',
    ])
    expect(env.TMPDIR).not.toBe('/tmp')
  } finally {
    delete process.env.AWS_CA_BUNDLE
    delete process.env.RCLONE_DRY_RUN
  }
})

test('what is given of a remote is a secret, but for what is known to be none', () => {
  const remotes = {
    a: { type: 'sftp', host: 'nas.lan', user: 'backup', pass: 'hunter2', key_file: '/root/key' },
    b: { type: 's3', access_key_id: 'AKIA0', secret_access_key: 's3cr3t', session_token: 't0k3n' },
    c: { type: 'webdav', url: 'https://u:ur1%2Fpw@dav', headers: 'X-Auth,h3ader', pass: '' },
    d: { type: 'storj', access_grant: 'gr4nt', env_auth: 'true', chunk_size: '64Mi' },
    e: { type: 'azureblob', sas_url: 'https://blob/?sig=s1gn' },
    f: { type: 'crypt', remote: ":webdav,url='https://tok3n@dav',bearer_token=b3arer:backups" },
  }
  const env = { RCLONE_CONFIG_PASS: 'c0nf', HTTPS_PROXY: 'http://p:pr0xy@proxy', SSH_AUTH_SOCK: '/run/agent' }
  const secrets = secretsOf({ remoteName: 'a', remotes, env })
  const told = (text: string) => redact(text, secrets)
  for (const secret of [
    'hunter2',
    'AKIA0',
    's3cr3t',
    't0k3n',
    'ur1%2Fpw',
    'ur1/pw',
    'X-Auth,h3ader',
    'h3ader',
    'gr4nt',
    'https://blob/?sig=s1gn',
    'tok3n',
    'b3arer',
    'c0nf',
    'pr0xy',
    ...['backup:hunter2', 'u:ur1/pw', 'p:pr0xy'].map(text => Buffer.from(text).toString('base64')),
  ]) {
    expect(told(`a <${secret}> b`)).toBe('a <***> b')
  }
  const harmless =
    'sftp to nas.lan for backup with /root/key: true 64Mi https://dav/ :webdav:backups /run/agent'
  expect(told(harmless)).toBe(harmless)
})

test('secrets are taken out of a text, also as part of an address, and the longer one whole', () => {
  expect(redact('a hunter2 b hunter2/x c', ['hunter2', 'hunter2/x'])).toBe('a *** b *** c')
  expect(redact('http://u:p%2Fw@nas', ['p/w'])).toBe('http://u:***@nas')
  expect(redact('nothing', [])).toBe('nothing')
})

test('the password of an address is taken out whoever gave it', () => {
  expect(redact('Get "http://u:p@w@nas/x": oh http://nas:80/a@b', [])).toBe(
    'Get "http://u:***@nas/x": oh http://nas:80/a@b',
  )
})

test.each([
  ['a query', 'p%21a%28b%29%27%2A+%C3%BC%22'],
  ['a path', "p!a(b)'*%20%C3%BC%22"],
  ['small letters', 'p%21a%28b%29%27%2a%20%c3%bc%22'],
  ['a string', `p!a(b)'* ü\\"`],
  ['JSON', `p!a(b)\\u0027* ü\\"`],
])('a secret is found as it is escaped in %s', (_, form) => {
  expect(redact(`x${form}y`, [`p!a(b)'* ü"`])).toBe('x***y')
})

test('the lines of a secret are found alone and together', () => {
  const secret = 'BEGIN\nabc+def\n'
  expect(redact('x BEGIN\\nabc+def\\n y', [secret])).toBe('x *** y')
  expect(redact('abc+def y', [secret])).toBe('*** y')
})

test('an empty or very short secret leaves the text readable', () => {
  expect(redact('permission denied', ['', 'e', 'rm'])).toBe('permission denied')
})

test('a program that prints no list of backends is told with what to look at', () => {
  expect(() => parseBackends('Usage: other')).toThrow(/no list of backends.*`rclone version`/)
})

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
  [{ nas: { type: 'tape' } }, 'tape'],
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

test('passwords, tokens and keys are secrets; hosts and paths are none', () => {
  const remotes = {
    a: { type: 'sftp', host: 'nas.lan', user: 'backup', pass: 'hunter2', key_file: '/root/key' },
    b: { type: 's3', access_key_id: 'AKIA0', secret_access_key: 's3cr3t', session_token: 't0k3n' },
  }
  const env = { RCLONE_CONFIG_PASS: 'c0nf', HTTPS_PROXY: 'http://proxy' }
  expect(secretsOf({ remoteName: 'a', remotes, env }).sort()).toEqual(
    ['AKIA0', 'c0nf', 'hunter2', 's3cr3t', 't0k3n'].sort(),
  )
})

test('secrets are taken out of a text, also as part of an address, and the longer one whole', () => {
  expect(redact('a hunter2 b hunter2/x c', ['hunter2', 'hunter2/x'])).toBe('a *** b *** c')
  expect(redact('http://u:p%2Fw@nas', ['p/w'])).toBe('http://u:***@nas')
  expect(redact('nothing', [])).toBe('nothing')
})

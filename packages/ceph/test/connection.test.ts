import { afterEach, expect, test, vi } from 'vitest'
import {
  type CephOptions,
  connectionArguments,
  connectionEnvironment,
  qemuFileName,
  toConnection,
} from '../src/connection.ts'
import { checkedSnapshot, imageArguments } from '../src/image-name.ts'
import { CephConnector } from '../src/index.ts'

const KEY = 'AQDh8whrbWR9GRAAbrrFsmy5xBZt5XiBmUchwA=='

afterEach(() => {
  vi.unstubAllEnvs()
})

test('a connection becomes options, with a limit for each request', () => {
  const connection = toConnection({
    conf: '/etc/ceph/a.conf',
    user: 'varve',
    keyring: '/etc/ceph/varve.keyring',
    monitors: ['10.0.0.1', '[2001:db8::1]:6789'],
    timeoutMs: 1_500,
  })
  expect(connectionArguments(connection)).toEqual([
    '--conf=/etc/ceph/a.conf',
    '--mon-host=10.0.0.1,[2001:db8::1]:6789',
    '--id=varve',
    '--keyring=/etc/ceph/varve.keyring',
    '--client-mount-timeout=2',
    '--rados-mon-op-timeout=2',
    '--rados-osd-op-timeout=2',
  ])
  expect(connectionEnvironment(connection)).toEqual({})
})

test('a key is in the environment alone, beside the options that are there', () => {
  vi.stubEnv('CEPH_ARGS', '--cluster=east')
  const connection = toConnection({ user: 'varve', key: KEY })
  expect(connectionArguments(connection).join(' ')).not.toContain(KEY)
  expect(connectionEnvironment(connection)).toEqual({ CEPH_ARGS: `--cluster=east --key=${KEY}` })
})

test('what a disk does not name comes from the options, but never the key of another user', () => {
  const options = { conf: '/c', user: 'varve', keyring: '/k', timeoutMs: 5_000 }
  expect(toConnection(options)).toEqual(options)
  expect(toConnection(options, { user: 'varve' })).toEqual(options)
  expect(toConnection(options, { monitors: ['a'] })).toEqual({ ...options, monitors: ['a'] })
  expect(toConnection(options, { user: 'libvirt' })).toEqual({
    conf: '/c',
    user: 'libvirt',
    timeoutMs: 5_000,
  })
  expect(toConnection(options, { key: KEY })).toEqual({
    conf: '/c',
    user: 'varve',
    key: KEY,
    timeoutMs: 5_000,
  })
  expect(toConnection({}, {})).toEqual({ timeoutMs: 60_000 })
})

test.for<[string, CephOptions]>([
  ['conf', { conf: 'ceph.conf' }],
  ['keyring', { keyring: 'varve.keyring' }],
  ['user', { user: '--help' }],
  ['user', { user: 'client.varve' }],
  ['monitors', { monitors: [] }],
  ['monitors', { monitors: ['10.0.0.1 --key=x'] }],
  ['timeoutMs', { timeoutMs: 0 }],
  ['key', { key: KEY, keyring: '/k' }],
  ['key', { key: KEY.slice(0, -8) }],
  ['key', { key: `${KEY} --conf=/tmp/x` }],
  ['key', { key: '' }],
])('a connection whose %s cannot be is refused, and no key is told', ([field, options]) => {
  expect(() => new CephConnector(options)).toThrow(
    expect.objectContaining({ code: 'INVALID_CONFIG', message: expect.stringMatching(`^${field} of`) }),
  )
  expect(() => new CephConnector(options)).not.toThrow(/AQDh8/)
})

test('a name of QEMU has a backslash before what would end a part of it', () => {
  const connection = toConnection({ user: 'varve', monitors: ['10.0.0.1:6789', '10.0.0.2'], timeoutMs: 1 })
  expect(qemuFileName(['vms', 'a b:c@d\\e'], connection, '/k')).toBe(
    'rbd:vms/a b\\:c\\@d\\\\e:id=varve:keyring=\\/k:mon_host=10.0.0.1\\:6789,10.0.0.2' +
      ':client_mount_timeout=1:rados_mon_op_timeout=1:rados_osd_op_timeout=1',
  )
})

test('an image is named by its pool, its namespace and its name', () => {
  expect(imageArguments('vms/disk')).toEqual(['--pool=vms', '--image=disk'])
  expect(imageArguments('vms/tenant/disk', 'one')).toEqual([
    '--pool=vms',
    '--namespace=tenant',
    '--image=disk',
    '--snap=one',
  ])
})

test.for(['disk', '', '/disk', 'vms/', 'vms//disk', 'a/b/c/d', 'vms/disk@one', 'vms/-x', 'vms/a\nb'])(
  '%j names no image',
  text => {
    expect(() => imageArguments(text)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  },
)

test.for(['', 'a/b', 'a@b', '-a', 'a\n'])('%j names no snapshot', text => {
  expect(() => checkedSnapshot(text)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
})

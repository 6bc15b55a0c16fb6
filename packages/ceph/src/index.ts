/**
 * RBD images of Ceph clusters as disks of instances, by the `rbd` program.
 *
 * @packageDocumentation
 */
export { CephConnector } from './ceph-connector.ts'
export type { CephOptions } from './connection.ts'

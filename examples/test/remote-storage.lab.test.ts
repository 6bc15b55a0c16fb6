import { describe } from 'vitest'
import { describeRemoteJob, runningGuest, stoppedInstance } from './remote-job.ts'

// A guest on the other storages is in remote-storage.thorough.test.ts.
describe('of a running guest', () => describeRemoteJob(['s3'], runningGuest))
describe('of an instance that is off', () => describeRemoteJob(['sftp', 'ftp', 'rclone'], stoppedInstance))

import { describe } from 'vitest'
import { describeRemoteJob, runningGuest } from './remote-job.ts'

describe('of a running guest', () => describeRemoteJob(['sftp', 'ftp', 'rclone'], runningGuest))

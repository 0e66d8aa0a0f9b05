// SPDX-License-Identifier: Apache-2.0

// Package sessionrecording records what happens in a pod: the sessions of kubectl exec
// and attach, in the format asciicast v2. It sends a recording to a recorder that the
// caller's grants name, and writes it to a local directory. A kubectl port-forward
// cannot be replayed, so only the caller, the ports, the times and the amount of data
// are logged.
//
// [Recorder.Begin] decides, before anything is sent to the API server, whether a
// request becomes a session and whether that can be recorded. A required recorder has
// answered when Begin returns. The session then takes the place of the client's
// connection that reverse_proxy copies to and from ([Session.Wrap]). All data in both
// directions passes through it, including what the client sends before the connection
// is upgraded. It forwards only whole frames that it understands.
//
// The caller who is recorded is an adversary who writes both the requests and the
// frames. Therefore:
//
//   - The kind of a request is decided from what the API server will see. An ambiguous
//     path is refused, and transport kubernetes does not send a request that was
//     changed after the decision (package pin).
//   - A protocol that the package cannot parse is refused. The API server is not
//     offered extensions of WebSocket, such as compression.
//   - Frames are parsed as the API server parses them. A frame that cannot be parsed,
//     or that has data on an unknown stream, ends the session.
//   - A frame is forwarded after it was handed to the recording. The amount of data
//     that waits for a recorder is limited: a slow recorder slows the session down.
//   - A request that leads to something other than the streams of a pod, such as a
//     proxy subresource, cannot be recorded. It is refused if the caller's grants
//     enforce recording.
package sessionrecording

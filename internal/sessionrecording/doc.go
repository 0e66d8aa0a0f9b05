// SPDX-License-Identifier: Apache-2.0

// Package recording records what is done in a pod: the sessions of kubectl exec
// and attach, as asciicast v2, sent to the recorders that a caller's grants name,
// and written to a local directory. Of kubectl port-forward, which cannot be
// replayed, it notes who, where, when and how much.
//
// # Where it stands
//
// [Site.Begin] decides, before anything is sent to the API server, whether a
// request becomes a session and whether that can be recorded; a recorder that has
// to be reached has been reached when it returns. The session then takes the place
// of the connection that reverse_proxy copies between ([Session.Wrap]). All that
// goes either way passes it, what a client sent ahead of the switch included, and
// only whole frames that it has understood go on.
//
// # Threat model
//
// The one who is recorded is the one who writes the requests and the frames.
// Hence:
//
//   - What a request is, is decided by what the API server will see. A path that
//     can be understood in two ways is refused, and transport kubernetes decides
//     once more about the request that it sends ([Confirm]).
//   - A protocol that cannot be parsed is not spoken. Extensions of WebSocket, such
//     as compression, are not offered to the API server.
//   - Frames are parsed as the API server parses them. One that cannot be, and data
//     on a stream of which it is not known what it carries, ends the session.
//   - A frame goes on when it has been handed to the recording, not before. What a
//     recorder has not taken yet is bounded: a slow one slows the session down.
//   - What cannot be recorded by its nature, because it leads to something else
//     than a pod's streams (the proxy subresources), is refused to callers that
//     have to be recorded.
package sessionrecording

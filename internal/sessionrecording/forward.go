// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	portforward "k8s.io/apimachinery/pkg/util/portforward"
)

// maxPorts is how many ports of a port-forward are noted.
const maxPorts = 64

// forwarded is a session as an observer of port-forward.
type forwarded Session

// opened implements observer.
func (f *forwarded) opened(h streamHeader) (stream, error) {
	port := h.Get(corev1.PortHeader)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note(port)
	return "", nil
}

// note notes a port.
func (f *forwarded) note(port string) {
	switch {
	case port == "" || slices.Contains(f.ports, port):
	case len(f.ports) < maxPorts:
		f.ports = append(f.ports, port)
	case len(f.ports) == maxPorts:
		f.ports = append(f.ports, "and more")
	}
}

// fromClient implements observer.
func (f *forwarded) fromClient(_ stream, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent += int64(len(p))
	return nil
}

// fromServer implements observer.
func (f *forwarded) fromServer(_ stream, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.received += int64(len(p))
	return nil
}

// forwardProtocol returns the protocol of a port-forward.
func (s *Session) forwardProtocol(version string) (protocol, error) {
	if s.upgrade == websocketUpgrade && version != portforward.WebsocketsSPDYTunnelingPortForwardV1 {
		// No other protocol heeds the ports of the query.
		for _, port := range strings.Split(strings.Join(s.query["ports"], ","), ",") {
			(*forwarded)(s).note(port)
		}
		return &webSocket{
			observer: (*forwarded)(s),
			base64:   version == v4Base64Channels,
			channel:  func(byte) (stream, bool) { return "", true },
			out:      noChannel, errors: noChannel,
		}, nil
	}
	inner, err := newSPDY((*forwarded)(s))
	if err != nil {
		return nil, err
	}
	inner.anyStream = true // each is for one connection, and there is no limit to them
	if s.upgrade == spdyUpgrade {
		return inner, nil
	}
	return &webSocket{
		whole:    true,
		observer: &tunnel{client: filter{next: inner.fromClient}, server: filter{next: inner.fromServer}},
		out:      noChannel, errors: noChannel,
	}, nil
}

// tunnel is a SPDY connection inside of a WebSocket, as an observer of that.
type tunnel struct{ client, server filter }

// opened implements observer. A WebSocket opens no streams.
func (*tunnel) opened(streamHeader) (stream, error) { return "", nil }

// fromClient implements observer.
func (t *tunnel) fromClient(_ stream, p []byte) error {
	_, err := t.client.push(p)
	return err
}

// fromServer implements observer.
func (t *tunnel) fromServer(_ stream, p []byte) error {
	_, err := t.server.push(p)
	return err
}

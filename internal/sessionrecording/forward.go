// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/url"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	portforward "k8s.io/apimachinery/pkg/util/portforward"
)

// maxPorts is how many ports of a port-forward are noted.
const maxPorts = 64

// forwarding is the observer of a port-forward. It notes the ports and counts bytes.
type forwarding struct {
	query url.Values          // of the request
	grow  func(n int64) error // for the frames inside of others, see [filter]

	mu       sync.Mutex
	ports    []string
	sent     int64 // to the pod
	received int64 // from the pod
}

// protocol returns the protocol with the given version over upgrade.
func (f *forwarding) protocol(upgrade, version string) (protocol, error) {
	if upgrade == websocketUpgrade && version != portforward.WebsocketsSPDYTunnelingPortForwardV1 {
		// The API server reads the ports in the query only with these protocols.
		for _, port := range strings.Split(strings.Join(f.query["ports"], ","), ",") {
			f.note(port)
		}
		return &webSocket{
			observer: f,
			base64:   version == v4Base64Channels,
			channel:  func(byte) (stream, bool) { return "", true },
			out:      noChannel, errors: noChannel,
		}, nil
	}
	inner, err := newSPDY(f)
	if err != nil {
		return nil, err
	}
	inner.anyStream = true // one for each connection, without a limit
	if upgrade == spdyUpgrade {
		return inner, nil
	}
	return &webSocket{
		whole:    true,
		observer: &tunnel{client: filter{next: inner.fromClient, grow: f.grow}, server: filter{next: inner.fromServer, grow: f.grow}},
		out:      noChannel, errors: noChannel,
	}, nil
}

// note notes a port.
func (f *forwarding) note(port string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case port == "" || slices.Contains(f.ports, port):
	case len(port) > len("65535"):
		// The API server does not forward to it.
	case len(f.ports) < maxPorts:
		f.ports = append(f.ports, port)
	case len(f.ports) == maxPorts:
		f.ports = append(f.ports, "and more")
	}
}

// noted returns the ports noted so far.
func (f *forwarding) noted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.ports)
}

// fields returns what the log says about the port-forward.
func (f *forwarding) fields() []zap.Field {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []zap.Field{zap.Strings("ports", slices.Clone(f.ports)), zap.Int64("bytes_sent", f.sent), zap.Int64("bytes_received", f.received)}
}

// streamOpened implements observer.
func (f *forwarding) streamOpened(h streamHeader) (stream, error) {
	f.note(h.Get(corev1.PortHeader))
	return "", nil
}

// fromClient implements observer.
func (f *forwarding) fromClient(_ stream, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent += int64(len(p))
	return nil
}

// fromServer implements observer.
func (f *forwarding) fromServer(_ stream, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.received += int64(len(p))
	return nil
}

// tunnel is the observer of a WebSocket with a SPDY connection inside.
type tunnel struct{ client, server filter }

// streamOpened implements observer. A WebSocket opens no streams.
func (*tunnel) streamOpened(streamHeader) (stream, error) { return "", nil }

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

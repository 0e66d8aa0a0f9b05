// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

// forwarder connects the streams of one request with ports on loopback.
type forwarder struct {
	ctx context.Context // ends with the request's connection
}

var _ portforward.PortForwarder = forwarder{}

// PortForward implements [portforward.PortForwarder]. It returns when the server has
// closed its side or the request's connection ends. The context argument ends with
// neither.
func (f forwarder) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	var d net.Dialer
	nc, err := d.DialContext(f.ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	defer nc.Close()
	stop := context.AfterFunc(f.ctx, func() { _ = nc.Close() }) // ends the copy below
	defer stop()

	// Do not wait for this: it ends only when the caller closes the stream, possibly
	// long after the server has answered.
	go func() {
		_, _ = io.Copy(nc, stream) // fails when either side has closed
		_ = nc.(*net.TCPConn).CloseWrite()
	}()
	if _, err := io.Copy(stream, nc); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

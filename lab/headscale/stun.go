// SPDX-License-Identifier: Apache-2.0

package headscale

import (
	"errors"
	"net"
	"net/netip"

	"tailscale.com/net/stun"
	"tailscale.com/types/logger"
)

// stunServer tells nodes the source address of their packets. On loopback they know
// it, but without an answer a node waits three seconds before it reports that it is
// ready.
type stunServer struct {
	conn *net.UDPConn
	done chan struct{} // closed when it no longer answers
}

// startSTUN starts a STUN server on a free port of host.
func startSTUN(host netip.Addr, logf logger.Logf) (*stunServer, error) {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host, 0)))
	if err != nil {
		return nil, err
	}
	s := &stunServer{conn: conn, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		if err := s.serve(); !errors.Is(err, net.ErrClosed) {
			logf("serve: %v", err)
		}
	}()
	return s, nil
}

// serve answers requests until the connection fails or is closed.
func (s *stunServer) serve() error {
	var buf [1500]byte
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(buf[:])
		if err != nil {
			return err
		}
		id, err := stun.ParseBindingRequest(buf[:n])
		if err != nil {
			continue // not a request
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if _, err := s.conn.WriteToUDPAddrPort(stun.Response(id, from), from); err != nil {
			return err
		}
	}
}

// port returns the port of the server.
func (s *stunServer) port() int { return s.conn.LocalAddr().(*net.UDPAddr).Port }

// stop stops the server.
func (s *stunServer) stop() error {
	err := s.conn.Close()
	<-s.done
	return err
}

// SPDX-License-Identifier: Apache-2.0

package headscale

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"tailscale.com/derp/derpserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
)

// derp is a DERP relay. Nodes need one even if they can reach each other
// directly, as the first packets go through it.
type derp struct {
	relay *derpserver.Server
	http  *http.Server
	port  int
	done  chan struct{} // closed when http no longer accepts connections
}

// startDERP starts a relay on a free port of host.
func startDERP(host netip.Addr, logf logger.Logf) (*derp, error) {
	ca, err := pki.NewCA("lab DERP")
	if err != nil {
		return nil, err
	}
	cert, err := ca.Server()
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", netip.AddrPortFrom(host, 0).String())
	if err != nil {
		return nil, err
	}
	d := &derp{
		relay: derpserver.New(key.NewNode(), logf),
		port:  ln.Addr().(*net.TCPAddr).Port,
		done:  make(chan struct{}),
	}
	mux := http.NewServeMux()
	mux.Handle("/derp", derpserver.Handler(d.relay))
	// Nodes measure the latency of the relay.
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	d.http = &http.Server{
		Handler:   mux,
		ErrorLog:  logger.StdLogger(logf),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		// The relay hijacks connections, which HTTP/2 does not support.
		Protocols: new(http.Protocols),
	}
	d.http.Protocols.SetHTTP1(true)
	go func() {
		defer close(d.done)
		if err := d.http.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
			logf("serve: %v", err)
		}
	}()
	return d, nil
}

// stop closes the relay and its connections.
func (d *derp) stop() error {
	err := errors.Join(d.http.Close(), d.relay.Close())
	<-d.done
	return err
}

// DERPMap returns a map with which nodes of another control server can use this
// server's relay.
func (s *Server) DERPMap() *tailcfg.DERPMap {
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{900: {
		RegionID: 900, RegionCode: "lab", RegionName: "Lab",
		Nodes: []*tailcfg.DERPNode{{
			Name: "900a", RegionID: 900, HostName: s.host.String(), IPv4: s.host.String(), IPv6: "none",
			DERPPort: s.derp.port, STUNPort: s.stun.port(), InsecureForTests: true,
		}},
	}}}
}

// derpMap returns the DERP map, as YAML, of a relay and a STUN server on host.
// Nodes cannot verify the relay's certificate (insecurefortests).
func derpMap(host netip.Addr, derpPort, stunPort int) []byte {
	return fmt.Appendf(nil, `regions:
  900:
    regionid: 900
    regioncode: lab
    regionname: Lab
    nodes:
      - name: 900a
        regionid: 900
        hostname: %[1]s
        ipv4: %[1]s
        ipv6: none
        derpport: %[2]d
        stunport: %[3]d
        insecurefortests: true
`, host, derpPort, stunPort)
}

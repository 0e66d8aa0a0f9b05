// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
)

const (
	domain      = "tail-scale.ts.net"
	service     = tailcfg.ServiceName("svc:k8s-api")
	serviceHost = "k8s-api." + domain
)

var serviceAddr = netip.MustParseAddr("100.100.7.7")

// kubectl goes on through the name of a Tailscale Service while its replicas restart one
// after another, and while one hangs or is killed.
func TestService_ServesWithoutOneReplica(t *testing.T) {
	inNamespace(t, serveService)
}

func serveService(t *testing.T) {
	w := startCluster(t)
	s := startServices(w)
	w.startReplicas(s.tailnet(), serviceHost, func(node string) string { return "tailscale-service/" + node + "/k8s-api" })
	w.joinMachine(s.tailnet())
	s.allow()
	go s.direct(t.Context())
	kubeconfig := w.kubeconfig(serviceHost)
	w.until("kubectl is answered", func() error { _, err := w.kubectl(kubeconfig, "get", "namespace", "default"); return err })
	s.bothActive()

	for _, fault := range []struct {
		name        string
		begin, undo func(*Replica)
		// keeps is whether no request may be lost.
		keeps bool
	}{
		{"restarts", func(r *Replica) { w.check(r.Terminate()); w.check(r.Start()) }, func(*Replica) {}, true},
		{"restarts", func(r *Replica) { w.check(r.Terminate()); w.check(r.Start()) }, func(*Replica) {}, true},
		{"hangs", func(r *Replica) { s.signal(r, syscall.SIGSTOP) }, func(r *Replica) { s.signal(r, syscall.SIGCONT) }, false},
		{"is killed", func(r *Replica) { r.Kill() }, func(r *Replica) { w.check(r.Start()) }, false},
	} {
		serving := s.serving()
		l := w.get(kubeconfig)
		streams := w.openStreams("before "+serving.Name+" "+fault.name, kubeconfig)
		w.until("kubectl has got several answers", func() error {
			if n := len(l.since(time.Time{})); n < 3 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		began := time.Now()
		fault.begin(serving)
		for _, stream := range w.openStreams("while "+serving.Name+" "+fault.name, kubeconfig) {
			stream.kill()
		}
		down := time.Now()
		w.until("kubectl has got several answers", func() error {
			if n := len(l.since(down)); n < 3 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		if now := s.serving(); now == serving {
			t.Errorf("%s still serves", now.Name)
		}
		w.logEnds(streams, serving.Name+" "+fault.name, began)
		fault.undo(serving)
		made, lost, later, longest, last := l.outcome(began)
		t.Logf("through the service, while %s %s: %d requests made, %d lost, longest wait %.1f s", serving.Name, fault.name, made, lost, longest.Seconds())
		if later > 0 || fault.keeps && lost > 0 {
			t.Errorf("while %s %s: %d requests failed, %d of them begun later; the last: %v", serving.Name, fault.name, lost, later, last)
		}
		s.bothActive()
	}
}

// services is the control server of Tailscale's own tests, which does as it is told, and
// what has to be told: which nodes may host the service, and which of them gets its traffic.
type services struct {
	w       *world
	control *testcontrol.Server

	mu     sync.Mutex
	active map[string]bool // replicas that offer themselves, by name
	route  string          // the replica that gets the traffic
}

func startServices(w *world) *services {
	w.Helper()
	control := &testcontrol.Server{DERPMap: derptest.Start(w), DNSConfig: &tailcfg.DNSConfig{Proxied: true}, MagicDNSDomain: domain, Logf: logger.Discard}
	// As a grant with the service as its destination, and with no node.
	control.ModifyFirstMapResponse = func(r *tailcfg.MapResponse, _ *tailcfg.MapRequest) {
		r.PacketFilters = map[string][]tailcfg.FilterRule{"service": {{SrcIPs: []string{"*"}, CapGrant: []tailcfg.CapGrant{{
			Dsts:   []netip.Prefix{netip.PrefixFrom(serviceAddr, serviceAddr.BitLen())},
			CapMap: tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: {`{"impersonate":{"groups":["system:masters"]}}`}},
		}}}}}
	}
	control.HTTPTestServer = httptest.NewServer(control)
	w.Cleanup(control.HTTPTestServer.Close)
	control.SetGlobalAppCaps(tailcfg.PeerCapMap{})
	control.AddDNSRecords(tailcfg.DNSRecord{Name: serviceHost, Value: serviceAddr.String()})
	return &services{w: w, control: control, active: make(map[string]bool)}
}

func (s *services) tailnet() Tailnet {
	return Tailnet{s.control.HTTPTestServer.URL, func(bool) (string, error) { return "unused", nil }}
}

// node returns the node of that hostname.
func (s *services) node(name string) *tailcfg.Node {
	for _, n := range s.control.AllNodes() {
		if n.Hostinfo.Valid() && n.Hostinfo.Hostname() == name {
			return n
		}
	}
	return nil
}

// allow gives the nodes tags, and lets the replicas host the service.
func (s *services) allow() {
	s.w.Helper()
	hosted, err := json.Marshal(tailcfg.ServiceIPMappings{service: {serviceAddr}})
	if err != nil {
		s.w.Fatal(err)
	}
	for name, tag := range map[string]string{"laptop": "tag:laptop", s.w.Replicas[0].Name: "tag:k8s", s.w.Replicas[1].Name: "tag:k8s"} {
		var n *tailcfg.Node
		s.w.until(name+" is on the tailnet", func() error {
			if n = s.node(name); n == nil {
				return fmt.Errorf("the control server does not know it")
			}
			return nil
		})
		n.Name, n.Tags = name+"."+domain+".", []string{tag}
		s.control.UpdateNode(n)
		if tag == "tag:k8s" {
			s.control.SetNodeCapMap(n.Key, tailcfg.NodeCapMap{tailcfg.NodeAttrServiceHost: {tailcfg.RawMessage(hosted)}})
		}
	}
}

// asking is how long a node may take to say whether it offers itself. One that hangs or is
// gone does not answer.
const asking = time.Second

// direct sends the traffic of the service to a replica that offers itself.
func (s *services) direct(ctx context.Context) {
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		var offering []string
		for _, r := range s.w.Replicas {
			n := s.node(r.Name)
			active := n != nil && s.offers(ctx, n.Key)
			if n != nil && !active { // a node on a busy machine may be slow once
				active = s.offers(ctx, n.Key)
			}
			s.mu.Lock()
			s.active[r.Name] = active
			s.mu.Unlock()
			if active {
				offering = append(offering, r.Name)
			}
		}
		s.mu.Lock()
		current := s.route
		s.mu.Unlock()
		if len(offering) == 0 || slices.Contains(offering, current) {
			continue
		}
		// First the new one, so that there is always one.
		s.control.SetSubnetRoutes(s.node(offering[0]).Key, []netip.Prefix{netip.PrefixFrom(serviceAddr, 32)})
		if n := s.node(current); n != nil {
			s.control.SetSubnetRoutes(n.Key, nil)
		}
		s.mu.Lock()
		s.route = offering[0]
		s.mu.Unlock()
	}
}

// offers asks a node whether it offers itself as a host of the service.
func (s *services) offers(ctx context.Context, node key.NodePublic) bool {
	client := &http.Client{Transport: s.control.NodeRoundTripper(node), Timeout: asking}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node/vip-services", nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	var answer tailcfg.C2NVIPServicesResponse
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return false
	}
	return slices.ContainsFunc(answer.VIPServices, func(v *tailcfg.VIPService) bool { return v.Name == service && v.Active })
}

// serving returns the replica that gets the traffic.
func (s *services) serving() *Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.w.Replicas {
		if r.Name == s.route {
			return r
		}
	}
	s.w.Fatal("no replica gets the traffic")
	return nil
}

// bothActive waits until both replicas offer themselves.
func (s *services) bothActive() {
	s.w.Helper()
	s.w.until("both replicas offer themselves", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, r := range s.w.Replicas {
			if !s.active[r.Name] {
				return fmt.Errorf("%s does not", r.Name)
			}
		}
		return nil
	})
}

func (s *services) signal(r *Replica, sig syscall.Signal) {
	s.w.Helper()
	if err := r.Signal(sig); err != nil {
		s.w.Fatal(err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"tailscale.com/net/socks5"
	"tailscale.com/tsnet"
)

// Caller is a device on the tailnet that calls the API server.
type Caller struct {
	CallerSpec
	// Server is its tailnet node.
	Server *tsnet.Server
	// Kubeconfig is the path of a kubeconfig file with which kubectl acts as this
	// caller. It is empty in a lab without Caddy (see TrustKubeconfig). Its token means nothing, as being
	// on the tailnet is the credential. What matters is its SOCKS proxy on loopback,
	// which leads into this tailnet node and whose password is in the file.
	Kubeconfig string

	lab   *Lab
	log   *os.File
	socks net.Listener
	proxy *url.URL // with the password
}

// Join connects another caller to the tailnet. It stops with the lab.
func (l *Lab) Join(ctx context.Context, spec CallerSpec) (*Caller, error) {
	c := &Caller{CallerSpec: spec, lab: l}
	if err := c.join(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("joining the tailnet: %w (log: %s)", err, l.Log(spec.Name)), c.Stop())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Callers[spec.Name] = c
	return c, nil
}

func (c *Caller) join(ctx context.Context) error {
	key, err := c.key(ctx)
	if err != nil {
		return err
	}
	if c.log, err = os.Create(c.lab.Log(c.Name)); err != nil {
		return err
	}
	logf := func(format string, args ...any) { fmt.Fprintf(c.log, format+"\n", args...) }
	c.Server = &tsnet.Server{
		Hostname:   c.Name,
		Dir:        filepath.Join(c.lab.Dir, "callers", c.Name),
		ControlURL: c.lab.Headscale.URL(),
		AuthKey:    key,
		Ephemeral:  true,
		Logf:       logf,
		UserLogf:   logf,
	}
	if _, err := c.Server.Up(ctx); err != nil {
		return err
	}
	if err := c.serveProxy(logf); err != nil {
		return err
	}
	if c.lab.Caddy == nil {
		return nil // there is no proxy to call
	}
	c.Kubeconfig = filepath.Join(c.lab.Dir, c.Name+".kubeconfig")
	return c.WriteKubeconfig(c.Kubeconfig, "https://"+ProxyName+"."+Domain)
}

// serveProxy starts the SOCKS proxy that kubectl uses, on loopback.
func (c *Caller) serveProxy(logf func(string, ...any)) (err error) {
	if c.socks, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	password := rand.Text()
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.dialPatiently(ctx, network, address, logf)
	}
	proxy := &socks5.Server{Logf: logf, Dialer: dial, Username: c.Name, Password: password}
	go func() { _ = proxy.Serve(c.socks) }() // until the listener is closed
	c.proxy = &url.URL{Scheme: "socks5", User: url.UserPassword(c.Name, password), Host: c.socks.Addr().String()}
	return nil
}

// key returns an auth key for the caller's user or tags.
func (c *Caller) key(ctx context.Context) (string, error) {
	if len(c.Tags) > 0 {
		return c.lab.Headscale.TagKey(ctx, c.Tags...)
	}
	if err := c.lab.Headscale.CreateUser(ctx, c.Login); err != nil {
		return "", err
	}
	return c.lab.Headscale.UserKey(ctx, c.Login)
}

// Dial connects to an address of the tailnet as this caller.
func (c *Caller) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return Dial(ctx, c.Server, network, address)
}

// DialAttempt is how long Dial waits for an answer before it tries from another
// port, and how long it retries a name that the node does not know.
const DialAttempt = 3 * time.Second

// Dial connects to an address of the tailnet as node.
//
// Each attempt uses another local port. For a minute after the server has closed a
// connection, the network stack of a tsnet server drops all packets from the
// client's port of that connection: it waits for late packets, and would accept a
// new connection only on a listening socket of its own, which tsnet's listeners do
// not have. As clients choose their ports at random, this happens once in some
// thousand connections.
//
// A node may also fail to resolve the name of a peer for a tenth of a second. It
// then asks the host's DNS, so the error says that the name does not exist. Dial
// tries again in this case too. The same goes for an address of which the node knows no
// peer (yet): it dials that over the network of the host, where something else may answer.
// If the error remains, it names the peers that the node sees.
func Dial(ctx context.Context, node *tsnet.Server, network, address string) (net.Conn, error) {
	began := time.Now()
	for {
		attempt, cancel := context.WithTimeout(ctx, DialAttempt)
		conn, err := dialOnce(attempt, node, network, address)
		cancel()
		if err == nil || ctx.Err() != nil {
			return conn, err
		}
		var name *net.DNSError
		unknown := errors.As(err, &name) || errors.Is(err, errNoPeer)
		switch {
		case unknown && time.Since(began) < DialAttempt:
			select {
			case <-ctx.Done():
				return nil, err
			case <-time.After(50 * time.Millisecond):
			}
		case unknown:
			return nil, fmt.Errorf("%w (the node sees %s)", err, peersOf(ctx, node))
		case !errors.Is(err, context.DeadlineExceeded):
			return nil, err
		}
	}
}

var errNoPeer = errors.New("the node knows no peer with the address, and dialled over the network of the host")

// dialOnce connects to an address of the tailnet as node.
func dialOnce(ctx context.Context, node *tsnet.Server, network, address string) (net.Conn, error) {
	conn, err := node.Dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if _, ok := conn.(*gonet.TCPConn); !ok {
		return nil, errors.Join(fmt.Errorf("%s: %w", address, errNoPeer), conn.Close())
	}
	return conn, nil
}

// peersOf returns the peers that a node sees, for messages.
func peersOf(ctx context.Context, node *tsnet.Server) string {
	client, err := node.LocalClient()
	if err != nil {
		return err.Error()
	}
	status, err := client.Status(ctx)
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, peer := range status.Peer {
		names = append(names, peer.DNSName)
	}
	slices.Sort(names)
	return fmt.Sprintf("%q", names)
}

// patience is how long kubectl waits for a connection. The SOCKS proxy's own limit
// is 5 s, which is too short for two attempts.
const patience = 20 * time.Second

// dialPatiently is [Dial] for kubectl, which does not retry. It logs failures.
func (c *Caller) dialPatiently(ctx context.Context, network, address string, logf func(string, ...any)) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	began := time.Now()
	conn, err := c.Dial(ctx, network, address)
	if took := time.Since(began); err != nil || took > DialAttempt {
		logf("%s: for kubectl: dialing %s took %v: %v", time.Now().Format(time.RFC3339Nano), address, took, err)
	}
	return conn, err
}

// REST returns a client configuration for the API server as this caller.
func (c *Caller) REST() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Proxy = nil
	config.Dial = c.Dial
	return config, nil
}

// WriteKubeconfig writes a kubeconfig to path with which kubectl calls the proxy at
// server as this caller.
func (c *Caller) WriteKubeconfig(path, server string) error {
	var ca []byte
	if u, err := url.Parse(server); err == nil && u.Scheme == "https" {
		if ca, err = c.lab.Caddy.CA(); err != nil {
			return err
		}
	}
	return c.TrustKubeconfig(path, server, ca)
}

// TrustKubeconfig is like WriteKubeconfig, for a proxy that is not the lab's Caddy and
// whose certificate is one of ca.
func (c *Caller) TrustKubeconfig(path, server string, ca []byte) error {
	cluster := &api.Cluster{Server: server, ProxyURL: c.proxy.String(), CertificateAuthorityData: ca}
	return clientcmd.WriteToFile(api.Config{
		Clusters: map[string]*api.Cluster{"lab": cluster},
		// Without any credentials, kubectl would ask for a user name. The proxy
		// removes this token.
		AuthInfos:      map[string]*api.AuthInfo{c.Name: {Token: "unused"}},
		Contexts:       map[string]*api.Context{"lab": {Cluster: "lab", AuthInfo: c.Name}},
		CurrentContext: "lab",
	}, path)
}

// closeTimeout is how long a node may take to leave the tailnet. It usually takes a
// tenth of a second.
const closeTimeout = 10 * time.Second

// Stop takes the caller off the tailnet.
func (c *Caller) Stop() error {
	var errs []error
	if c.Server != nil {
		// Closing a node that has some thousand half-closed connections never
		// returns (tsnet 1.102): it resets each of them into a queue that has no
		// reader left. The node then ends with the process.
		closed := make(chan error, 1)
		go func() { closed <- c.Server.Close() }()
		select {
		case err := <-closed:
			errs = append(errs, err)
		case <-time.After(closeTimeout):
		}
	}
	if c.socks != nil {
		errs = append(errs, c.socks.Close())
	}
	if c.log != nil {
		errs = append(errs, c.log.Close())
	}
	return errors.Join(errs...)
}

// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"tailscale.com/client/local"
	"tailscale.com/ipn"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// Tailnet is a control server.
type Tailnet struct {
	URL string
	// Key returns an auth key for the replicas, or for the clients' machine.
	Key func(replica bool) (string, error)
}

// World is a cluster, and two replicas in front of it.
type World struct {
	Lab      *lab.Lab
	Replicas [2]*Replica

	dir string
}

// Start starts a cluster, and a Headscale, which need not be used. All files are in dir.
func Start(ctx context.Context, dir string, progress io.Writer) (*World, error) {
	root, err := lab.Root()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	l, err := lab.Start(ctx, lab.Config{Dir: dir, Examples: filepath.Join(root, "examples"), Progress: progress})
	if err != nil {
		return nil, err
	}
	return &World{Lab: l, dir: dir}, nil
}

// Headscale returns the tailnet of the lab's Headscale, on which the clients' machine belongs
// to login.
func (w *World) Headscale(ctx context.Context, login string) (Tailnet, error) {
	if err := w.Lab.Headscale.CreateUser(ctx, login); err != nil {
		return Tailnet{}, err
	}
	return Tailnet{w.Lab.Headscale.URL(), func(replica bool) (string, error) {
		if replica {
			return w.Lab.ProxyKey(), nil
		}
		return w.Lab.Headscale.UserKey(ctx, login)
	}}, nil
}

// Stop stops the cluster.
func (w *World) Stop() error { return w.Lab.Stop() }

// Replica is a Caddy in a process of its own.
type Replica struct {
	*process.Process
	// Name is that of its node, and of the replica in messages. Each answer has it in the
	// header X-Replica.
	Name string
	// Log is the path of its log.
	Log string

	caddyfile string // its path
}

// StartReplicas starts two replicas of a site. Each binds what bind says about its node. They
// have one storage, and so one authority and one certificate.
func (w *World) StartReplicas(ctx context.Context, tn Tailnet, site string, bind func(node string) string) error {
	for i := range w.Replicas {
		name := fmt.Sprint("k8s-", i)
		r := &Replica{Name: name, Log: filepath.Join(w.dir, name+".log"), caddyfile: filepath.Join(w.dir, name+".caddyfile")}
		key, err := tn.Key(true)
		if err != nil {
			return err
		}
		if err := os.WriteFile(r.caddyfile, fmt.Appendf(nil, `{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %s
	log {
		output file %s
		format json
	}
	grace_period 10s
	shutdown_delay 4s
	tailscale {
		control_url %s
		auth_key %s
		state_dir %s
	}
	servers {
		protocols h1 h2
	}
}
https://%s {
	bind %s
	tls internal
	header X-Replica %s
	tailscale_kubernetes {
		kubeconfig %s
		whoami
	}
}
`, w.storage(), r.Log, tn.URL, key, filepath.Join(w.dir, "nodes-"+r.Name), site, bind(r.Name), r.Name, w.Lab.Kubeconfig()), 0o600); err != nil {
			return err
		}
		if err := r.Start(); err != nil {
			return err
		}
		w.Replicas[i] = r
		// The first one makes the authority.
		if err := Until(ctx, r.Name+" has the authority", func() error { _, err := os.Stat(w.Authority()); return err }); err != nil {
			return err
		}
	}
	return nil
}

// KillReplicas ends the replicas.
func (w *World) KillReplicas() {
	for _, r := range w.Replicas {
		if r != nil {
			r.Kill()
		}
	}
}

func (w *World) storage() string { return filepath.Join(w.dir, "caddy") }

// Authority returns the path of the certificate of the replicas' authority.
func (w *World) Authority() string {
	return filepath.Join(w.storage(), "pki", "authorities", "local", "root.crt")
}

// Start starts the replica, or starts it again.
func (r *Replica) Start() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "run", "--config", r.caddyfile, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), ownCaddy+"=yes")
	r.Process, err = process.Start(cmd)
	return err
}

// Terminate sends SIGTERM and waits for the end.
func (r *Replica) Terminate() error {
	if err := r.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-r.Done():
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("%s still runs a minute after SIGTERM", r.Name)
	}
}

// Machine is the machine of the namespace, on a tailnet.
type Machine struct {
	// Log is the path of tailscaled's log.
	Log string

	client *local.Client
	daemon *process.Process
	log    *os.File
}

// Join puts the machine on the tailnet, with its interface, routes and DNS. The files of its
// tailscaled are in dir.
func Join(ctx context.Context, tn Tailnet, dir string) (_ *Machine, err error) {
	path, err := components.Path("tailscaled")
	if err != nil {
		return nil, err
	}
	m := &Machine{Log: filepath.Join(dir, "log"), client: &local.Client{Socket: filepath.Join(dir, "socket"), UseSocketOnly: true}}
	if m.log, err = os.Create(m.Log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w (log: %s)", err, m.Log)
			m.Leave()
		}
	}()
	cmd := exec.Command(path, "--statedir="+dir, "--socket="+m.client.Socket, "--tun=tailscale0", "--port=0")
	cmd.Env = append(os.Environ(), "TS_LOGS_DIR="+dir)
	cmd.Stdout, cmd.Stderr = m.log, m.log
	if m.daemon, err = process.Start(cmd); err != nil {
		return nil, err
	}
	if err := Until(ctx, "tailscaled answers", func() error { _, err := m.client.StatusWithoutPeers(ctx); return err }); err != nil {
		return nil, err
	}
	prefs := ipn.NewPrefs()
	prefs.ControlURL, prefs.Hostname, prefs.WantRunning = tn.URL, "laptop", true
	key, err := tn.Key(false)
	if err != nil {
		return nil, err
	}
	if err := m.client.Start(ctx, ipn.Options{AuthKey: key, UpdatePrefs: prefs}); err != nil {
		return nil, err
	}
	if err := m.client.StartLoginInteractive(ctx); err != nil {
		return nil, err
	}
	return m, Until(ctx, "the machine is on the tailnet", func() error {
		status, err := m.client.StatusWithoutPeers(ctx)
		if err == nil && status.BackendState != ipn.Running.String() {
			err = errors.New(status.BackendState)
		}
		return err
	})
}

// Leave takes the machine off the tailnet.
func (m *Machine) Leave() {
	if m.daemon != nil {
		m.daemon.Kill()
	}
	_ = m.log.Close()
}

// Addresses returns the tailnet addresses of the node of that name, as the machine knows them.
func (m *Machine) Addresses(ctx context.Context, name string) (ip4, ip6 netip.Addr, err error) {
	err = Until(ctx, "the machine knows "+name, func() error {
		status, err := m.client.Status(ctx)
		if err != nil {
			return err
		}
		for _, peer := range status.Peer {
			if peer.HostName != name {
				continue
			}
			for _, ip := range peer.TailscaleIPs {
				if ip.Is4() {
					ip4 = ip
				} else {
					ip6 = ip
				}
			}
		}
		if !ip4.IsValid() || !ip6.IsValid() {
			return fmt.Errorf("it knows %v and %v", ip4, ip6)
		}
		return nil
	})
	return ip4, ip6, err
}

// WriteKubeconfig writes a kubeconfig for the site at host to path.
func (w *World) WriteKubeconfig(path, host string) error {
	authority, err := os.ReadFile(w.Authority())
	if err != nil {
		return err
	}
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"lab": {Server: "https://" + host, CertificateAuthorityData: authority}},
		AuthInfos:      map[string]*api.AuthInfo{"me": {Token: "unused"}},
		Contexts:       map[string]*api.Context{"lab": {Cluster: "lab", AuthInfo: "me"}},
		CurrentContext: "lab",
	}, path)
}

// Until waits until f returns nil, for two minutes at most.
func Until(ctx context.Context, what string, f func() error) error {
	for deadline := time.Now().Add(2 * time.Minute); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it is not so that %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

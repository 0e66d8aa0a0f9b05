// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
)

// upstream is a server to which proxies send requests, with the credentials it accepts.
type upstream struct {
	Host, CA, Token string
	kubeconfig      string
	cmd             *exec.Cmd
}

// writeKubeconfig writes a kubeconfig for the upstream.
func (u *upstream) writeKubeconfig(path string) error {
	u.kubeconfig = path
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"bench": {Server: u.Host, CertificateAuthorityData: []byte(u.CA)}},
		AuthInfos:      map[string]*api.AuthInfo{"bench": {Token: u.Token}},
		Contexts:       map[string]*api.Context{"bench": {Cluster: "bench", AuthInfo: "bench"}},
		CurrentContext: "bench",
	}, path)
}

// rest returns the configuration of a client that calls the upstream directly.
func (u *upstream) rest() *rest.Config {
	return &rest.Config{Host: u.Host, BearerToken: u.Token, TLSClientConfig: rest.TLSClientConfig{CAData: []byte(u.CA)}}
}

// startAnswers starts a server, in a process of its own, that holds the small answer
// in memory. It replaces the API server where only the proxy matters: the real one
// takes more CPU time per request than all proxies together, and would take that
// time from them on the same processors.
func startAnswers(dir string) (u *upstream, err error) {
	u = &upstream{cmd: exec.Command("/proc/self/exe", "answers")}
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	u.cmd.Stderr = os.Stderr
	stdout, err := u.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := u.cmd.Start(); err != nil {
		return nil, err
	}
	if err := json.NewDecoder(stdout).Decode(u); err != nil {
		return nil, errors.Join(fmt.Errorf("the server of small answers does not start: %w", err), u.stop())
	}
	return u, u.writeKubeconfig(filepath.Join(dir, "answers.kubeconfig"))
}

func (u *upstream) stop() error {
	if u.cmd == nil {
		return nil
	}
	_ = u.cmd.Process.Kill()
	_ = u.cmd.Wait() // it was killed, so this is always an error
	return nil
}

// serveAnswers runs in that server's process.
func serveAnswers() error {
	ca, err := pki.NewCA("bench")
	if err != nil {
		return err
	}
	cert, err := ca.Server()
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	const token = "bench"
	answer := `{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"small"},"data":{"data":"` + strings.Repeat("x", smallSize-92) + `"}}`
	server := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ErrorLog:  log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer "+token {
				http.Error(w, "wrong token", http.StatusUnauthorized)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, answer)
		}),
	}
	if err := json.NewEncoder(os.Stdout).Encode(upstream{Host: "https://" + ln.Addr().String(), CA: string(ca.PEM()), Token: token}); err != nil {
		return err
	}
	return server.ServeTLS(ln, "", "")
}

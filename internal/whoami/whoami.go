// SPDX-License-Identifier: Apache-2.0

// Package whoami shows callers who they are to the cluster, and why: as a page, as JSON, or
// as text for a terminal. The page has no scripts and loads nothing.
package whoami

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
)

// Facts are what is known about a caller.
type Facts struct {
	// User and Groups are the Kubernetes user and groups, empty if the caller is
	// refused. Source says where the groups come from: grants, tags or none.
	User   string  `json:"user,omitempty"`
	Groups []Group `json:"groups,omitempty"`
	Source string  `json:"source,omitempty"`

	// Refused is the message of a refusal, empty if the caller is not refused. Reason
	// is its reason, as in the metrics.
	Refused string `json:"refused,omitempty"`
	Reason  string `json:"reason,omitempty"`

	// ID, Device, Address, Login, Tags and Shared are what the tailnet node reports
	// about the caller's device.
	ID      string   `json:"id,omitempty"`
	Device  string   `json:"device,omitempty"`
	Address string   `json:"address,omitempty"`
	Login   string   `json:"login,omitempty"`
	Tags    []string `json:"tags,omitempty"`
	Shared  bool     `json:"shared,omitempty"`
	// TagsLeftOut reports whether the Tags are not groups because of the problems of
	// Grants.
	TagsLeftOut bool `json:"tags_left_out,omitempty"`

	// Capability is the name under which the caller has grants, and Grants are their
	// values. LooksFor is the name that is looked up first.
	Capability string  `json:"capability,omitempty"`
	Grants     []Grant `json:"grants,omitempty"`
	LooksFor   string  `json:"looks_for,omitempty"`
	// HeldBack are the groups that requests use only if they ask for them.
	HeldBack []Group `json:"held_back,omitempty"`
	// ReadOnly is the caller's group for reading only, empty if it has none.
	ReadOnly string `json:"read_only,omitempty"`
	// Cut are the granted groups that an option of the handler removes.
	Cut []Cut `json:"cut,omitempty"`

	Recording Recording `json:"recording"`

	// Proxy is the name of the tailnet node that reported the caller, and Service that of
	// the Tailscale Service that the caller dialled, if it was one. Listen are the
	// addresses of the node's server, and Server is the URL that the caller used.
	Proxy   string   `json:"proxy,omitempty"`
	Service string   `json:"service,omitempty"`
	Listen  []string `json:"listen,omitempty"`
	Server  string   `json:"server,omitempty"`
	// Sites are the other sites of this Caddy that the caller may use, and
	// SitesIncomplete reports whether there may be more: a site has not answered.
	Sites           []Site `json:"sites,omitempty"`
	SitesIncomplete bool   `json:"sites_incomplete,omitempty"`
	// Kubeconfig is a kubeconfig for Server and Sites.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// CA is the authority of the server's certificate, nil if clients know it.
	CA *x509.Certificate `json:"-"`
	// CAFingerprint is the fingerprint of CA.
	CAFingerprint string `json:"ca_fingerprint,omitempty"`
}

// Group is a Kubernetes group of the caller.
type Group struct {
	Name string `json:"name"`
	// Grants are the numbers, from 1, of the grants that give it. It is empty if the
	// group is a tag of the device.
	Grants []int `json:"grants,omitempty"`
}

// Grant is a value of the capability, the groups that it gives, and what is wrong with it.
type Grant struct {
	Value  json.RawMessage `json:"value"`
	Groups []string        `json:"groups,omitempty"`
	// Problems are the keys in Value that are unknown or repeated, a sentence each.
	Problems []string `json:"problems,omitempty"`
}

// Cut is a granted group that an option of the handler removes.
type Cut struct {
	Name string `json:"name"`
	// Option is the name of the option.
	Option string `json:"option"`
	Grants []int  `json:"grants,omitempty"`
}

// Recording says whether the caller's sessions are recorded, by recorders or to files of
// the proxy.
type Recording struct {
	Wanted    bool     `json:"wanted"`
	Files     bool     `json:"files,omitempty"`
	Enforced  bool     `json:"enforced,omitempty"`
	Requests  bool     `json:"requests,omitempty"`
	Recorders []string `json:"recorders,omitempty"`
}

// Choices returns what the caller can choose among.
func (f *Facts) Choices() kubeconfig.Choices {
	return f.here().kubeconfig().Choices
}

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"css":     func() template.CSS { return template.CSS(pageCSS) }, //nolint:gosec // a constant
	"indent":  indented,
	"next":    func(i int) int { return i + 1 },
	"numbers": numbers,
	"asking":  asking,
	// The page is the proxy's own, so it does not repeat the proxy's name.
	"sentence": func(refused string) string { return strings.TrimPrefix(refused, apistatus.Prefix) },
}).Parse(pageHTML))

// policy is the Content-Security-Policy. It allows nothing but the page's own style.
var policy = func() string {
	sum := sha256.Sum256([]byte(pageCSS))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// maxServer is the length of the longest URL of a site, in bytes. A name has at most 253, and
// the answer repeats the URL many times.
const maxServer = 512

// Serve answers r with f: as a kubeconfig if r's query has kubeconfig, as JSON if r accepts
// JSON and not HTML, and as a page otherwise. f.Server must be set. The error is a refusal
// if r's Host makes that no URL, or a long one, or if r asks for a site that the caller may
// not use.
func Serve(w http.ResponseWriter, r *http.Request, f *Facts) error {
	config, err := f.kubeconfig(r)
	if err != nil {
		return err
	}
	text, err := kubeconfig.Write(config)
	if err != nil {
		return fmt.Errorf("making a kubeconfig: %w", err)
	}
	f.Kubeconfig = string(text)
	if f.SitesIncomplete {
		f.Kubeconfig = "# Not every site has answered. This may lack some.\n" + f.Kubeconfig
	}
	current := config.Contexts[config.CurrentContext].Cluster
	file := filename(config.Clusters[current].Server)
	if f.CA != nil {
		f.CAFingerprint = siteca.Fingerprint(f.CA)
	}

	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("Content-Security-Policy", policy)
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Vary", "Accept")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Frame-Options", "DENY")

	var body bytes.Buffer
	code := http.StatusOK
	switch {
	case r.URL.Query().Has("kubeconfig"):
		header.Set("Content-Type", "application/yaml")
		header.Set("Content-Disposition", `attachment; filename="`+file+`"`)
		body.WriteString(f.Kubeconfig)
	case wantsJSON(r):
		header.Set("Content-Type", "application/json")
		encoder := json.NewEncoder(&body)
		encoder.SetIndent("", "  ")
		err = encoder.Encode(f)
	default:
		header.Set("Content-Type", "text/html; charset=utf-8")
		err = page.Execute(&body, struct {
			*Facts
			Curl string
		}{f, f.curl(r, file)})
	}
	if err != nil {
		return fmt.Errorf("writing who the caller is: %w", err)
	}
	if f.Refused != "" && header.Get("Content-Disposition") == "" {
		code = http.StatusForbidden
	}
	header.Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(code)
	if r.Method == http.MethodHead {
		return nil
	}
	// An error means that the client is gone. Caddy would log it with the whole request.
	_, _ = w.Write(body.Bytes())
	return nil
}

// curl returns the command that writes the kubeconfig to a file. r is for the page.
func (f *Facts) curl(r *http.Request, file string) string {
	command := "curl -fsS "
	if f.CA != nil {
		command += "--cacert root.crt "
	}
	return command + quote(f.Server+r.URL.EscapedPath()+"?kubeconfig") + " > " + quote(file)
}

// wantsJSON reports whether r asks for JSON rather than for a page.
func wantsJSON(r *http.Request) bool {
	accept := strings.Join(r.Header["Accept"], ",")
	return strings.Contains(accept, "application/json") && !strings.Contains(accept, "text/html")
}

// filename returns the file name for a kubeconfig for server.
func filename(server string) string {
	name := "cluster"
	if u, err := url.Parse(server); err == nil && u.Hostname() != "" {
		name = strings.Map(func(c rune) rune {
			if strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-.", c) {
				return c
			}
			return '-'
		}, strings.ToLower(u.Hostname()+strings.TrimRight(u.Path, "/")))
	}
	return name + ".kubeconfig"
}

// lineLength is the maximum length of JSON on one line.
const lineLength = 72

// indented returns value on one line if it fits, or else indented.
func indented(value json.RawMessage) string {
	var out bytes.Buffer
	if err := json.Compact(&out, value); err == nil && out.Len() <= lineLength {
		return out.String()
	}
	out.Reset()
	if err := json.Indent(&out, value, "", "  "); err != nil {
		return string(value)
	}
	return out.String()
}

// numbers describes where a group comes from: "grant 1", "grants 1 and 3", or a tag if
// grants is empty.
func numbers(grants []int) string {
	switch len(grants) {
	case 0:
		return "a tag of this device"
	case 1:
		return "grant " + strconv.Itoa(grants[0])
	}
	words := make([]string, len(grants))
	for i, n := range grants {
		words[i] = strconv.Itoa(n)
	}
	return "grants " + strings.Join(words[:len(words)-1], ", ") + " and " + words[len(words)-1]
}

// asking returns kubectl's flags with which user asks for group, quoted for a shell.
func asking(user, group string) string {
	return "--as=" + quote(user) + " --as-group=" + quote(group)
}

// quote quotes s for a shell.
func quote(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._:@/") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

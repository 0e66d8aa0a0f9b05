// SPDX-License-Identifier: Apache-2.0

package s3

import (
	"bytes"
	stdcmp "cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/google/go-cmp/cmp"
)

func TestCaddyfile_AllOptions(t *testing.T) {
	s := new(Storage)
	err := s.UnmarshalCaddyfile(caddyfile.NewTestDispenser(`s3 {
		bucket            recordings
		endpoint          https://minio.example.com:9000
		region            eu-central-1
		prefix            prod/
		access_key_id     {env.ID}
		secret_access_key {env.KEY}
		encryption        kms alias/recordings
		object_lock       compliance 90d
		storage_class     STANDARD_IA
		path_style
		trusted_ca        /etc/ca.pem
		insecure_http
	}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	const want = `{
	"bucket": "recordings",
	"endpoint": "https://minio.example.com:9000",
	"region": "eu-central-1",
	"prefix": "prod/",
	"access_key_id": "{env.ID}",
	"secret_access_key": "{env.KEY}",
	"encryption": "kms",
	"kms_key": "alias/recordings",
	"object_lock": "compliance",
	"object_lock_for": 7776000000000000,
	"storage_class": "STANDARD_IA",
	"path_style": true,
	"trusted_ca": "/etc/ca.pem",
	"insecure_http": true
}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
}

func TestCaddyfile_Errors(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"s3 recordings", `unexpected argument "recordings": options go into a block`},
		{"s3 {\nbuckets a\n}", `unknown option "buckets"`},
		{"s3 {\nbucket\n}", "bucket has no value"},
		{"s3 {\nbucket \"\"\n}", "bucket has no value"},
		{"s3 {\nbucket a b\n}", `unexpected argument "b" after bucket`},
		{"s3 {\nbucket a\nbucket b\n}", "bucket is given twice"},
		{"s3 {\nbucket a {\nb\n}\n}", "bucket takes no block"},
		{"s3 {\npath_style yes\n}", `unexpected argument "yes" after path_style`},
		{"s3 {\ninsecure_http yes\n}", `unexpected argument "yes" after insecure_http`},
		{"s3 {\nencryption\n}", "encryption: must be s3, or kms and a key"},
		{"s3 {\nencryption kms\n}", "encryption: must be s3, or kms and a key"},
		{"s3 {\nencryption s3 key\n}", "encryption: must be s3, or kms and a key"},
		{"s3 {\nobject_lock compliance\n}", "object_lock has no value"},
		{"s3 {\nobject_lock compliance long\n}", `object_lock "long": must be a duration, such as 90d`},
	} {
		err := new(Storage).UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.text))
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%q: got %v; want %s", tt.text, err, tt.want)
		}
	}
}

func TestProvision_Errors(t *testing.T) {
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_DEFAULT_REGION", "")
	noPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(noPEM, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ text, want string }{
		{`{}`, "bucket: missing"},
		{`{"bucket": "Upper_Case"}`, `bucket "Upper_Case": `},
		{`{"bucket": "{env.S3_TEST_NONE}"}`, "bucket: "},
		{`{"bucket": "abc"}`, "region: missing"},
		{`{"bucket": "abc", "endpoint": "minio.example.com"}`, `endpoint "minio.example.com": must be a URL`},
		{`{"bucket": "abc", "endpoint": "https://example.com/path"}`, `endpoint "https://example.com/path": must be a URL without a user and a path`},
		{`{"bucket": "abc", "endpoint": "https://user@example.com"}`, `endpoint "https://user@example.com": must be a URL`},
		{`{"bucket": "abc", "endpoint": "https://user:password@example.com"}`, `endpoint "https://user:xxxxx@example.com": must be a URL`},
		{`{"bucket": "abc", "endpoint": "https://user:password@example.com:x%"}`, "endpoint: is not a URL"},
		{`{"bucket": "abc", "endpoint": "https://example.com?key=password"}`, `endpoint "https://example.com?...": must be a URL`},
		{`{"bucket": "abc", "endpoint": "http://example.com"}`, `endpoint "http://example.com": recordings would be sent without encryption`},
		{`{"bucket": "abc", "region": "r", "prefix": "/a"}`, `prefix "/a": `},
		{`{"bucket": "abc", "region": "r", "prefix": "a//"}`, `prefix "a//": `},
		{`{"bucket": "abc", "region": "r", "access_key_id": "a"}`, "access_key_id and secret_access_key: only one"},
		{`{"bucket": "abc", "region": "r", "encryption": "aes"}`, `encryption "aes": must be s3 or kms`},
		{`{"bucket": "abc", "region": "r", "encryption": "kms"}`, "encryption kms: needs a key"},
		{`{"bucket": "abc", "region": "r", "kms_key": "k"}`, "encryption kms: needs a key"},
		{`{"bucket": "abc", "region": "r", "object_lock": "legal", "object_lock_for": "1d"}`, `object_lock "legal": must be governance or compliance`},
		{`{"bucket": "abc", "region": "r", "object_lock_for": "1d"}`, `object_lock "": must be governance or compliance`},
		{`{"bucket": "abc", "region": "r", "object_lock": "governance"}`, "object_lock governance: needs a duration"},
		{`{"bucket": "abc", "region": "r", "trusted_ca": "/nowhere/ca.pem"}`, "trusted_ca: "},
		{`{"bucket": "abc", "region": "r", "trusted_ca": "` + noPEM + `"}`, "trusted_ca " + noPEM + ": holds no certificate"},
	} {
		s := new(Storage)
		if err := json.Unmarshal([]byte(tt.text), s); err != nil {
			t.Fatal(err)
		}
		if err := s.Provision(caddy.Context{}); err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "password") {
			t.Errorf("%s: got %v; want %s", tt.text, err, tt.want)
		}
	}
}

func TestString_NamesThePlaceWithoutCredentials(t *testing.T) {
	t.Setenv("AWS_REGION", "eu-central-1")
	s := &Storage{Bucket: "recordings", Prefix: "prod/", AccessKeyID: "id", SecretAccessKey: "secret"}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	if got, want := s.String(), "s3 https://s3.eu-central-1.amazonaws.com/recordings/prod/"; got != want {
		t.Errorf("got %q; want %q", got, want)
	}
}

// put stores one recording at a server that takes all, and returns the request.
func put(t *testing.T, s *Storage) (http.Header, error) {
	t.Helper()
	headers := make(chan http.Header, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		headers <- r.Header
		w.Header().Set("ETag", `"etag"`)
	}))
	defer server.Close()
	s.Bucket, s.Endpoint, s.InsecureHTTP = "recordings", server.URL, true
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "a.cast", io.NewSectionReader(strings.NewReader("recording"), 0, 9)); err != nil {
		return nil, err
	}
	return <-headers, nil
}

// No S3 server that runs here encrypts or has storage classes: this is what one is told.
func TestPut_TellsTheServer(t *testing.T) {
	credentials := Storage{AccessKeyID: "id", SecretAccessKey: "secret"}
	for _, tt := range []struct {
		name   string
		change func(*Storage)
		want   map[string]string
	}{
		{"nothing", func(*Storage) {}, map[string]string{
			"X-Amz-Server-Side-Encryption": "", "X-Amz-Storage-Class": "", "X-Amz-Object-Lock-Mode": "",
			"Content-Type": "application/x-asciicast", "Content-Md5": "+4m5wreCYe8qtQbjDZyE9w==",
		}},
		{"s3", func(s *Storage) { s.Encryption = "s3" }, map[string]string{"X-Amz-Server-Side-Encryption": "AES256"}},
		{"kms", func(s *Storage) { s.Encryption, s.KMSKey = "kms", "alias/k" }, map[string]string{
			"X-Amz-Server-Side-Encryption": "aws:kms", "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id": "alias/k",
		}},
		{"class", func(s *Storage) { s.StorageClass = "GLACIER_IR" }, map[string]string{"X-Amz-Storage-Class": "GLACIER_IR"}},
		{"lock", func(s *Storage) { s.ObjectLock, s.ObjectLockFor = "governance", caddy.Duration(time.Hour) }, map[string]string{"X-Amz-Object-Lock-Mode": "GOVERNANCE"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := credentials
			tt.change(&s)
			header, err := put(t, &s)
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range tt.want {
				if got := header.Get(name); got != want {
					t.Errorf("%s is %q; want %q", name, got, want)
				}
			}
		})
	}
}

// The usual places are asked anew, and nothing is sent without credentials.
func TestCredentials_OfTheUsualPlaces(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY": "", "AWS_SECRET_KEY": "", "AWS_PROFILE": "proxy",
		"AWS_SHARED_CREDENTIALS_FILE": file,
		// Nothing answers here.
		"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/", "AWS_WEB_IDENTITY_TOKEN_FILE": "",
	} {
		t.Setenv(name, value)
	}
	if _, err := put(t, new(Storage)); !errors.Is(err, errNoCredentials) {
		t.Errorf("without credentials, got %v", err)
	}
	if err := os.WriteFile(file, []byte("[proxy]\naws_access_key_id = of-file\naws_secret_access_key = secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	header, err := put(t, new(Storage))
	if err != nil {
		t.Fatal(err)
	}
	if got := header.Get("Authorization"); !strings.Contains(got, "Credential=of-file/") {
		t.Errorf("the request is signed with %q; want the file's key", got)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "of-environment")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	if header, err = put(t, new(Storage)); err != nil {
		t.Fatal(err)
	}
	if got := header.Get("Authorization"); !strings.Contains(got, "Credential=of-environment/") {
		t.Errorf("the request is signed with %q; want the environment's key", got)
	}
}

// Credentials that were replaced are found without a reload.
func TestCredentials_AreLookedUpAgainOnceRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(key string) {
		if err := os.WriteFile(file, []byte("[default]\naws_access_key_id = "+key+"\naws_secret_access_key = secret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY": "", "AWS_SECRET_KEY": "", "AWS_PROFILE": "", "AWS_SHARED_CREDENTIALS_FILE": file} {
		t.Setenv(name, value)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if !strings.Contains(r.Header.Get("Authorization"), "Credential=new/") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("ETag", `"etag"`)
	}))
	defer server.Close()
	write("old")
	s := &Storage{Bucket: "recordings", Endpoint: server.URL, InsecureHTTP: true}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	try := func() error {
		return s.Put(t.Context(), "a.cast", io.NewSectionReader(strings.NewReader("recording"), 0, 9))
	}
	if err := try(); err == nil || !strings.HasPrefix(err.Error(), "AccessDenied (403): ") {
		t.Errorf("got %v; want 403", err)
	}
	write("new")
	if err := try(); err != nil {
		t.Errorf("with new credentials, got %v", err)
	}
}

// A connection that breaks, as when a player has paused, is replaced. What is read is the
// whole recording, once.
func TestOpen_GoesOnAfterBreaks(t *testing.T) {
	const id = "20261130T120000Z-aaaaaaaaaaaaaaaaaaaaaaaaaa"
	content := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	for _, tt := range []struct {
		name   string
		breaks int // how many answers are cut off in a row
		etag   string
		want   string // the error
	}{
		{"now and then", 1, `"one"`, "<nil>"},
		{"for ever", 1 << 20, `"one"`, io.ErrUnexpectedEOF.Error()},
		{"and is another object", 1, "", "PreconditionFailed (412)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answers := 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				answers++
				etag := stdcmp.Or(tt.etag, fmt.Sprintf(`"answer-%d"`, answers))
				w.Header().Set("ETag", etag)
				w.Header().Set("Last-Modified", modified)
				cut := answers%(tt.breaks+1) != 0
				if cut && answers > 1 && tt.breaks > 1 {
					w.Header().Set("Content-Length", "1000") // and nothing of it
					return
				}
				if cut {
					w = &cutting{w, 100_000}
				}
				http.ServeContent(w, r, "", time.Unix(1796117400, 0), bytes.NewReader(content))
			}))
			defer server.Close()
			s := &Storage{Bucket: "recordings", Endpoint: server.URL, InsecureHTTP: true, AccessKeyID: "id", SecretAccessKey: "secret"}
			if err := s.Provision(caddy.Context{}); err != nil {
				t.Fatal(err)
			}
			r, entry, err := s.Open(t.Context(), id)
			if err != nil || entry.Size != int64(len(content)) {
				t.Fatalf("got %+v, %v", entry, err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			switch {
			case !strings.Contains(fmt.Sprint(err), tt.want):
				t.Errorf("got %v; want %s", err, tt.want)
			case err == nil && !bytes.Equal(got, content):
				t.Errorf("got %d bytes that are not the recording's", len(got))
			}
			if answers < 2 {
				t.Error("no connection broke")
			}
		})
	}
}

// modified is when the recordings of these tests were written.
const modified = "Mon, 30 Nov 2026 12:00:00 GMT"

// cutting is an answer that breaks off.
type cutting struct {
	http.ResponseWriter
	left int
}

// Write implements [io.Writer].
func (c *cutting) Write(p []byte) (int, error) {
	if len(p) > c.left {
		_, _ = c.ResponseWriter.Write(p[:c.left])
		http.NewResponseController(c.ResponseWriter).Flush() //nolint:errcheck // it breaks off now
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

// A read that nothing answers ends with its context.
func TestOpen_EndsWithContext(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"one"`)
		w.Header().Set("Last-Modified", modified)
		w.Header().Set("Content-Length", "10")
		_, _ = io.WriteString(w, "12345")
		_ = http.NewResponseController(w).Flush()
		<-release
	}))
	defer server.Close()
	defer close(release)
	s := &Storage{Bucket: "recordings", Endpoint: server.URL, InsecureHTTP: true, AccessKeyID: "id", SecretAccessKey: "secret"}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	ended := errors.New("the reader has left")
	ctx, cancel := context.WithCancelCause(t.Context())
	r, _, err := s.Open(ctx, "20261130T120000Z-aaaaaaaaaaaaaaaaaaaaaaaaaa")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { cancel(ended) })
	if _, err := r.Read(make([]byte, 5)); !errors.Is(err, ended) {
		t.Errorf("got %v; want %v", err, ended)
	}
}

// listing is a server with n recordings, which answers with some of them at a time. before is
// called before each answer, and may be nil.
func listing(t *testing.T, n, page int, before func()) *Storage {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if before != nil {
			before()
		}
		from, _ := strconv.Atoi(r.URL.Query().Get("continuation-token"))
		to := min(n, from+page)
		_, _ = fmt.Fprintf(w, "<ListBucketResult><Name>recordings</Name><IsTruncated>%v</IsTruncated><NextContinuationToken>%d</NextContinuationToken>", to < n, to)
		for i := from; i < to; i++ {
			_, _ = fmt.Fprintf(w, "<Contents><Key>%s.cast</Key><LastModified>2026-11-30T12:00:00Z</LastModified><Size>1</Size></Contents>", nth(i))
		}
		_, _ = io.WriteString(w, "</ListBucketResult>")
	}))
	t.Cleanup(server.Close)
	s := &Storage{Bucket: "recordings", Endpoint: server.URL, InsecureHTTP: true, AccessKeyID: "id", SecretAccessKey: "secret"}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Cleanup() })
	return s
}

// nth returns the ID of the nth recording.
func nth(n int) string {
	return fmt.Sprintf("20261130T1200%02dZ-%s", n, strings.Repeat("a", 26))
}

// A list that stops early leaves nothing behind.
func TestList_LeavesNoGoroutines(t *testing.T) {
	s := listing(t, 10, 10, nil)
	before := runtime.NumGoroutine()
	const lists = 100
	for range lists {
		entries, err := s.List(t.Context(), "", 1)
		if err != nil || len(entries) != 1 || entries[0].ID != nth(0) {
			t.Fatalf("got %+v, %v", entries, err)
		}
	}
	// A few are those of the connection.
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+lists/2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines after %d lists; want about the %d of before", runtime.NumGoroutine(), lists, before)
		}
	}
}

// A list that could not go on is no short list: what it lacks would count as gone.
func TestList_EndsWithContext(t *testing.T) {
	ended := errors.New("the list takes too long")
	ctx, cancel := context.WithCancelCause(t.Context())
	pages := 0
	s := listing(t, 10, 2, func() { pages++ })
	entries, err := s.List(ctx, "", 100)
	if err != nil || len(entries) != 10 || pages != 5 {
		t.Fatalf("got %d entries in %d pages, %v", len(entries), pages, err)
	}
	cancel(ended)
	if entries, err := s.List(ctx, "", 100); !errors.Is(err, ended) {
		t.Errorf("got %+v, %v; want %v", entries, err, ended)
	}
}
